"use strict";
// One reader's way through the study: an image, an answer, a confidence; kept in the browser, exported by hand.
(() => {
const $ = id => document.getElementById(id);
const study = JSON.parse($("study").textContent), text = study.text, deep = study.bits === 16;
const say = (key, values = {}) => text[key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
const ANSWERS = {quality: ["good", "bad"], origin: ["real", "generated"]};
const REASONS = {anatomy: "a", disease: "d", artefact: "r", text_marker: "t", other: "o"};
const COLUMNS = ["study", "reader", "block", "position", "item", "answer", "confidence", "reasons", "ms", "time", "undone"];

let reader = 0, order = [];                  // order: [block, place in study.items] of every image to be rated
let answers = [], undone = {};               // what is rated so far; how often each position was taken back
let answer = "", reasons = [];               // of the image on screen
let spent = 0, since = null;                 // ms that the image was to be seen; null: it is not, now
let bitmap = null, view = {};

// --- storage: an entry an answer, for browsers put off writing large ones to disk

const slot = name => `minidiff-${study.id}-${reader}-${name}`;
function recall() {
  const get = name => JSON.parse(localStorage.getItem(slot(name))), found = [];
  try {
    for (let row; (row = get(found.length + 1)); ) found.push(row);
    return {answers: found, undone: get("undone") || {}};
  } catch { return {}; }
}
function keep() {
  const n = answers.length;
  try {
    if (n) localStorage.setItem(slot(n), JSON.stringify(answers[n - 1]));
    localStorage.removeItem(slot(n + 1));
    localStorage.setItem(slot("undone"), JSON.stringify(undone));
    localStorage.setItem(`minidiff-${study.id}`, reader);
    return true;
  } catch { return false; }
}

// --- the start

function choose(number) {
  reader = number >= 1 && number <= study.orders.length ? number : 0;
  const blocks = study.orders[reader - 1] || {};
  order = Object.entries(blocks).flatMap(([block, places]) => places.map(place => [block, place]));
  ({answers = [], undone = {}} = reader ? recall() : {});
  $("go").disabled = !reader;
  $("go").textContent = answers.length ? say("resume", {k: Math.min(answers.length + 1, order.length), n: order.length})
                                       : say("begin");
  const kept = !reader || keepable();
  $("warning").hidden = kept && !(number && !reader);
  $("warning").textContent = number && !reader ? say("other", {n: study.orders.length}) : say("unsaved");
}
function keepable() {
  try { localStorage.setItem("minidiff-try", "1"); localStorage.removeItem("minidiff-try"); return true; } catch { return false; }
}
function start() {
  document.querySelectorAll("[data-text]").forEach(node => { node.textContent = say(node.dataset.text); });
  const first = study.orders[0];
  $("heading").textContent = say("title");
  $("lead").textContent = say("welcome", {n: first.quality.length});
  $("definition-title").textContent = say("definition_title");
  $("definition").textContent = say(study.labelled ? "definition_label" : "definition");
  $("hash").textContent = say("key_hash", {hash: study.key});
  $("reader").max = study.orders.length;
  let last = "";
  try { last = localStorage.getItem(`minidiff-${study.id}`) || ""; } catch { /* said by choose() */ }
  $("reader").value = new URLSearchParams(location.search).get("reader") || last;
  choose(Number($("reader").value));
}

// --- one image

const block = () => order[Math.min(answers.length, order.length - 1)][0];
const parts = () => Object.keys(study.orders[0]).length;
const inBlock = name => order.filter(([b]) => b === name).length;

function show(only) {
  for (const id of ["start", "desk", "rest"]) $(id).hidden = id !== only;
}
async function next() {
  stop();
  [answer, reasons, spent] = ["", [], 0];
  if (answers.length === order.length) return rest("done");
  const at = answers.length, [name, place] = order[at], item = study.items[place];
  const done = order.slice(0, at).filter(([b]) => b === name).length;
  const count = {k: done + 1, n: inBlock(name)};
  show("desk");
  $("part").textContent = say(`${name}_title`, {n: parts()});
  $("criterion").textContent = say(name === "origin" ? "definition_origin" : study.labelled ? "definition_label" : "definition");
  $("progress").textContent = say("image", count);
  $("film").setAttribute("aria-label", say("image", count));
  [$("bar").max, $("bar").value] = [count.n, done];
  $("caption").hidden = item.label === undefined || name === "origin";
  $("caption").textContent = item.label === undefined ? "" : say("label", {label: item.label});
  $("answers").replaceChildren(...ANSWERS[name].map((code, k) => button(say(code), String(k + 1), () => mark(code), code)));
  $("reasons").hidden = name === "origin";
  $("undo").disabled = !undoable();
  if ($("panel").contains(document.activeElement)) $("film").focus();
  bitmap = null;
  mark("");
  reset();
  const loaded = await decode(place);
  if (at !== answers.length || $("desk").hidden) return;   // undone or paused meanwhile
  bitmap = loaded;
  draw();
  since = performance.now();
}
async function decode(place) {
  const image = new Image();
  image.src = "data:image/png;base64," + study.items[place].png;
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.width, image.height];
  const context = canvas.getContext("2d", {willReadFrequently: true});
  context.drawImage(image, 0, 0);
  const bytes = context.getImageData(0, 0, image.width, image.height).data, n = bytes.length / (deep ? 8 : 4);
  const greys = new Float32Array(n);                           // 0 to 255, of 16 bits in steps of 1/257
  for (let i = 0; i < n; i++) greys[i] = deep ? (256 * bytes[4 * i] + bytes[4 * (n + i)]) / 257 : bytes[4 * i];
  if (deep) canvas.height /= 2;                                // the lower bytes stood below the upper ones
  return {canvas, context, greys};
}
function stop() {
  if (since !== null) spent += performance.now() - since;
  since = null;
}
function mark(code) {
  answer = code;
  if (code !== "bad") reasons = [];
  for (const node of $("answers").children) node.setAttribute("aria-pressed", node.dataset.code === code);
  for (const node of $("reasons").querySelectorAll("button")) {
    node.disabled = code !== "bad";
    node.setAttribute("aria-pressed", reasons.includes(node.dataset.code));
  }
  for (const node of $("confidence").querySelectorAll("button")) node.disabled = !code;
}
function toggle(code) {
  if (answer !== "bad") return;
  reasons = reasons.includes(code) ? reasons.filter(r => r !== code) : [...reasons, code];
  mark(answer);
}
function settle(confidence) {
  if (!answer || !bitmap) return;
  stop();
  const at = answers.length, [name, place] = order[at];
  answers.push({block: name, position: at + 1, item: study.items[place].id, answer, confidence, reasons: reasons.slice().sort(),
                ms: Math.round(spent), time: new Date().toISOString(), undone: undone[at + 1] || 0});
  answer = "";
  keep();
  return atPart2() ? rest("origin") : next();
}
const atPart2 = () => answers.length > 0 && answers.length < order.length && answers[answers.length - 1].block !== block();
// What part 1 says is not changed by somebody who has begun part 2.
const undoable = () => answers.length > 0 && !($("rest").hidden && atPart2());
function undo() {
  if (answer) return mark("");
  if (!undoable()) return;
  const last = answers.pop();
  undone[last.position] = (undone[last.position] || 0) + 1;
  keep();
  next();
}

// --- pause, the second part, export

let mode = "";
function rest(why) {
  stop();
  mode = why;
  const done = why === "done", over = why !== "origin";
  show("rest");
  $("rest-title").textContent = say({done: "done_title", pause: "paused", export: "export", origin: "origin_title"}[why]);
  $("rest-lead").textContent = done ? say("done_lead") : why === "origin"
    ? say("origin_lead", {n: inBlock("origin")}) + " " + say("definition_origin")
    : say("part_lead", {k: answers.length, n: order.length});
  $("back").textContent = say(why === "export" ? "back" : why === "origin" ? "begin" : done ? "undo" : "go_on");
  $("files").hidden = $("copy").hidden = !over || !answers.length;
  $("files").replaceChildren(...["jsonl", "csv"].map(kind => button(say(`save_${kind}`), "", () => save(kind), kind)));
  $("rows").value = over ? rows("jsonl") : "";
  $("rest-title").focus();
}
function leave() {
  if (mode === "done") return undo();
  mode = "";
  if (since === null && bitmap && answers.length < order.length && $("answers").dataset.at === String(answers.length)) {
    show("desk");
    draw();
    since = performance.now();
  } else next();
}
function pause(why) {
  if ($("desk").hidden) return;
  $("answers").dataset.at = bitmap ? answers.length : "";
  rest(why);
}
const csv = value => /[",\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : String(value);
function rows(kind) {
  const whole = answers.map(a => ({study: study.id, reader, ...a}));
  if (kind === "jsonl") {
    const body = whole.map(a => JSON.stringify(Object.fromEntries(COLUMNS.map(c => [c, a[c]]))) + "\n").join("");
    return body + JSON.stringify({sha256: sha256(body), rows: whole.length}) + "\n";
  }
  const lines = whole.map(a => COLUMNS.map(c => csv(c === "reasons" ? a[c].join(" ") : a[c])).join(","));
  const body = [COLUMNS.join(","), ...lines].join("\n") + "\n";
  return body + `sha256,${sha256(body)},${whole.length}\n`;
}
function save(kind) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([rows(kind)], {type: kind === "csv" ? "text/csv" : "application/jsonl"}));
  link.download = `answers-${study.id}-reader${reader}.${kind}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// --- SHA-256 (FIPS 180-4); crypto.subtle is not to be had on every page opened from disk

function sha256(string) {
  const primes = [];
  for (let n = 2; primes.length < 64; n++) if (primes.every(p => n % p)) primes.push(n);
  const fraction = x => ((x - Math.floor(x)) * 2 ** 32) | 0;
  const k = primes.map(p => fraction(Math.cbrt(p))), h = primes.slice(0, 8).map(p => fraction(Math.sqrt(p)));
  const bytes = new TextEncoder().encode(string), length = bytes.length;
  const padded = new DataView(new ArrayBuffer((length + 72) & ~63));
  new Uint8Array(padded.buffer).set(bytes);
  padded.setUint8(length, 0x80);
  padded.setUint32(padded.byteLength - 8, Math.floor(length / 2 ** 29));
  padded.setUint32(padded.byteLength - 4, length << 3);
  const turn = (x, n) => (x >>> n) | (x << (32 - n));
  const w = new Int32Array(64);
  for (let at = 0; at < padded.byteLength; at += 64) {
    for (let t = 0; t < 64; t++) {
      if (t < 16) { w[t] = padded.getInt32(at + 4 * t); continue; }
      const x = w[t - 15], y = w[t - 2];
      w[t] = w[t - 16] + w[t - 7] + (turn(x, 7) ^ turn(x, 18) ^ (x >>> 3)) + (turn(y, 17) ^ turn(y, 19) ^ (y >>> 10));
    }
    let [a, b, c, d, e, f, g, i] = h;
    for (let t = 0; t < 64; t++) {
      const one = (i + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) + ((e & f) ^ (~e & g)) + k[t] + w[t]) | 0;
      const two = (turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
      [a, b, c, d, e, f, g, i] = [(one + two) | 0, a, b, c, (d + one) | 0, e, f, g];
    }
    [a, b, c, d, e, f, g, i].forEach((value, n) => { h[n] = (h[n] + value) | 0; });
  }
  return h.map(value => (value >>> 0).toString(16).padStart(8, "0")).join("");
}

// --- zoom, brightness, contrast

function reset() {
  view = {zoom: 1, x: 0.5, y: 0.5, invert: false};
  [$("level").value, $("window").value] = [128, 128];
  draw();
}
function draw() {
  const film = $("film"), side = Math.max(1, Math.round(film.clientWidth * devicePixelRatio));
  film.width = film.height = side;                             // which also clears it
  if (!bitmap) return;
  const {canvas, context, greys} = bitmap, out = context.createImageData(canvas.width, canvas.height);
  const level = 255.5 - $("level").value, width = 255 * 2 ** ((128 - $("window").value) / (deep ? 24 : 48));
  for (let i = 0; i < greys.length; i++) {
    const grey = (greys[i] - level) / width * 255 + 127.5, value = view.invert ? 255 - grey : grey;
    out.data[4 * i] = out.data[4 * i + 1] = out.data[4 * i + 2] = value;   // Uint8ClampedArray rounds and clips
    out.data[4 * i + 3] = 255;
  }
  if (study.window) {
    const [low, high, unit = ""] = study.window.split(" "), step = (high - low) / 255;
    $("scale").textContent = say("scale", {centre: Math.round(+low + level * step), width: Math.round(width * step), unit});
  }
  context.putImageData(out, 0, 0);
  const half = 0.5 / view.zoom, within = v => Math.min(1 - half, Math.max(half, v));
  [view.x, view.y] = [within(view.x), within(view.y)];
  film.getContext("2d").drawImage(canvas, (view.x - half) * canvas.width, (view.y - half) * canvas.height,
                                  canvas.width / view.zoom, canvas.height / view.zoom, 0, 0, side, side);
}
function zoom(by) {
  view.zoom = Math.min(8, Math.max(1, view.zoom * by));
  draw();
}
function slide(id, by) {
  $(id).value = Number($(id).value) + by;
  draw();
}
const fingers = new Map();
function drag(event) {
  const before = fingers.get(event.pointerId);
  if (!before) return;
  const [dx, dy] = [event.clientX - before[0], event.clientY - before[1]], side = $("film").clientWidth;
  const others = [...fingers].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
  fingers.set(event.pointerId, [event.clientX, event.clientY]);
  if (others.length) {                                         // two fingers: zoom by their distance
    const apart = (x, y) => Math.max(20, Math.hypot(x - others[0][0], y - others[0][1]));
    return zoom(apart(event.clientX, event.clientY) / apart(...before));
  }
  if (event.shiftKey || event.buttons === 2) { slide("level", -dy / 2); return slide("window", dx / 2); }
  [view.x, view.y] = [view.x - dx / side / view.zoom, view.y - dy / side / view.zoom];
  draw();
}

// --- buttons and keys

function button(words, key, act, code = "") {
  const node = document.createElement("button");
  node.type = "button";
  node.textContent = words;
  node.dataset.code = code;
  if (key) node.append(Object.assign(document.createElement("kbd"), {textContent: key, ariaHidden: "true"}));
  if (key) node.setAttribute("aria-keyshortcuts", key);
  node.addEventListener("click", act);
  return node;
}
const invert = () => { view.invert = !view.invert; draw(); };
const TOOLS = {undo: ["u", undo], pause: ["p", () => pause("pause")], zoom_in: ["+", () => zoom(1.25)],
               zoom_out: ["-", () => zoom(0.8)], invert: ["i", invert], reset: ["0", reset], export: ["", () => pause("export")]};
const KEYS = {ArrowUp: () => slide("level", 6), ArrowDown: () => slide("level", -6),
              ArrowRight: () => slide("window", 6), ArrowLeft: () => slide("window", -6), "=": () => zoom(1.25)};
function build() {
  for (const [code, key] of Object.entries(REASONS)) {
    $("reasons").append(button(say(code === "other" ? "other_reason" : code), key, () => toggle(code), code));
    KEYS[key] = () => toggle(code);
  }
  for (let k = 1; k <= 4; k++) $("confidence").append(button(say(`confidence_${k}`), String(k), () => settle(k), String(k)));
  for (const [code, [key, act]] of Object.entries(TOOLS)) {
    const node = button(say(code), key, act, code);
    node.id = code;
    $("buttons").append(node);
    if (key) KEYS[key] = act;
  }
}
function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat && !event.key.startsWith("Arrow")) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (!$("rest").hidden) {
    if (key === "p" && mode === "pause") leave();
    if (key === "u" && (mode === "origin" || mode === "done")) undo();
    return;
  }
  if ($("desk").hidden || event.target.type === "range" && key.startsWith("Arrow")) return;
  const digit = Number(key);
  if (!answer && (digit === 1 || digit === 2)) mark(ANSWERS[block()][digit - 1]);
  else if (answer && digit >= 1 && digit <= 4) settle(digit);
  else if (KEYS[key]) KEYS[key]();
  else return;
  event.preventDefault();
}

build();
start();
$("reader").addEventListener("input", () => choose(Number($("reader").value)));
$("who").addEventListener("submit", event => { event.preventDefault(); $("go").click(); });
$("go").addEventListener("click", () => (atPart2() ? rest("origin") : next()));
$("back").addEventListener("click", leave);
for (const id of ["level", "window"]) $(id).addEventListener("input", draw);
document.addEventListener("keydown", press);
document.addEventListener("visibilitychange", () => { if (document.hidden) pause("pause"); });
window.addEventListener("resize", () => { if (!$("desk").hidden) draw(); });
window.addEventListener("storage", event => { if (reader && event.key?.startsWith(slot(""))) location.reload(); });  // another window
window.addEventListener("beforeunload", event => { if (answers.length && !keep()) event.preventDefault(); });
$("film").addEventListener("pointerdown", event => {
  fingers.set(event.pointerId, [event.clientX, event.clientY]);
  $("film").setPointerCapture(event.pointerId);
});
$("film").addEventListener("pointermove", drag);
for (const name of ["pointerup", "pointercancel"]) $("film").addEventListener(name, e => fingers.delete(e.pointerId));
$("film").addEventListener("contextmenu", event => event.preventDefault());
$("film").addEventListener("wheel", event => { event.preventDefault(); zoom(event.deltaY < 0 ? 1.1 : 1 / 1.1); }, {passive: false});
})();
