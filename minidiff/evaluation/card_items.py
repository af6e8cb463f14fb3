"""The items of a model card and of a datasheet: which statement, from which file, asked for by
which guideline.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from minidiff import runs
from minidiff.data.split import SPLITS
from minidiff.evaluation.pages.format import num, percent, plain, signed, span
from minidiff.evaluation.written import Files, Item, Items, numbers, read_again

RESEARCH = "Research only. Not for diagnosis, treatment or triage, nor as a substitute for patients' images in either."
# images, below which a subgroup's figure is marked
FEW = 20
FIGURES = ("step", "loss", "val_loss", "gap", "skipped")  # of the last line of a log
MACHINE = ("machine", "threads", "torch", "python", "minidiff", "commit", "started", "command")


def model_card(files: Files) -> list[Item]:
    """Every item of the model card, filled or not."""
    add = Items("model card")
    model(add, files)
    add.section = "Intended use"
    add("use", RESEARCH, ["minidiff/evaluation/card_items.py: RESEARCH"],
        "TRIPOD+AI 3b; MI-CLAIM 1")
    ask(add, {"question of the study": "TRIPOD+AI 3a, 4; MI-CLAIM 1",
              "intended users": "TRIPOD+AI 3b, 27b", "known inequalities between "
              "groups": "TRIPOD+AI 3c", "clinical setting": "TRIPOD+AI 6a"})
    add.section = "Training data"
    data(add, files)
    training(add, files)
    likeness(add, files)
    subgroups(add, files)
    use(add, files)
    copies(add, files)
    limits(add, files)
    add.section = "For a person to say"
    ask(add, {"ethical approval and consent": "TRIPOD+AI 17", "funding": "TRIPOD+AI 18a",
              "conflicts of interest": "TRIPOD+AI 18b", "protocol and registration":
              "TRIPOD+AI 18c, 18d", "sharing of data and code": "TRIPOD+AI 18e, 18f",
              "patient and public involvement": "TRIPOD+AI 19", "interpretation": "TRIPOD+AI 25",
              "who is responsible, and how to reach them": "model cards",
              "licence of the model": "model cards"})
    return add.all


def datasheet(files: Files) -> list[Item]:
    """Every item of the datasheet, of the real data and of the synthetic set, filled or not."""
    add = Items("datasheet")
    add.section = "Motivation"
    ask(add,
        dict.fromkeys(("why it was made, by whom, for whom", "funding"), "datasheets, motivation"))
    add.section = "Composition"
    data(add, files)
    audited(add, files)
    add.section = "The synthetic set"
    made, at = files.get("report", "report.json", "samples")
    if made:
        add("images", f"{made['n']}: {plain(made['labels'])}", [at], "datasheets, composition")
    for name in ("model", "recipe"):
        value, at = files.get("samples", "manifest.json", name)
        if value:
            add(name, plain(value), [at], "datasheets, collection")
    listed, at = files.get("samples", "manifest.json", "trained_on")
    if listed:
        add("images that its model was trained on", f"{len(listed):,}, by SHA-256", [at],
            "datasheets, collection")
    for section, names in {
            "Collection": ("how and when images were acquired", "consent, and its withdrawal",
                           "ethical review"),
            "Uses": ("tasks it was used for", "what it should not be used for, beyond diagnosis"),
            "Distribution and maintenance": ("licence and terms", "how it is distributed",
                                             "who maintains it, and errata"),
    }.items():
        add.section = section
        ask(add, dict.fromkeys(names, f"datasheets, {section.lower()}"))
    return add.all


def ask(add: Items, asked: dict[str, str]) -> None:
    """Items that no file can fill."""
    for name, by in asked.items():
        add(name, asked_by=by)


def model(add: Items, files: Files) -> None:
    """What the model is."""
    add.section = "Model"
    parts = ("diffusion", "diffusion model", "model.safetensors"), ("vae", "autoencoder",
                                                                    "vae.safetensors")
    for kind, what, weights in parts:
        for name in ("architecture", "init", "train", "prediction"):
            value, at = files.get(kind, "config.json", name)
            if value:
                add(f"{what}, {name}", plain(value), [at], "TRIPOD+AI 22; MI-CLAIM 3")
        path = files.path(kind, weights)
        if path:
            add(f"{what}, numbers in the file of weights", f"{numbers(path):,}", [f"{path}"],
                "TRIPOD+AI 22")
            add(f"{what}, SHA-256 of that file", runs.sha256(path), [f"{path}"], "MI-CLAIM 6")
    variables, at = files.get("diffusion", "model.json", "variables")
    if variables:
        told = [f"{v['name']} ({', '.join(v['values'])})" if "values" in v else f"{v['name']} "
                f"({num(v['low'])} to {num(v['high'])}, mean {num(v['mean'])})" for v in variables]
        add("conditions, each of which may be unknown", "; ".join(told), [at], "TRIPOD+AI 9a, 11")
    recipe, at = files.get("samples", "manifest.json", "recipe")
    if recipe:
        add("sampling", plain(recipe), [at], "MI-CLAIM 6")


def data(add: Items, files: Files) -> None:
    """Folders, images and patients of each split and label, what was left out, and whether the
    splits are apart.
    """
    kind = next((k for k in ("diffusion", "vae", "classifier", "audit")
                 if files.get(k, "config.json", "data")[0]), "")
    folders, at = files.get(kind, "config.json", "data")
    add("data folders", plain(folders or ""), [at] if at else [], "TRIPOD+AI 5a")
    fingerprint, held = files.get(kind, "run.json", "facts", "data")
    if isinstance(fingerprint, str):
        add("fingerprint of the data", fingerprint, [held], "MI-CLAIM 6")
    for folder in folders or ():
        drawn = Path(folder) / "phantom.json"
        if drawn.is_file():
            add("these are no patients", f"drawn by a program: {plain(runs.read_json(drawn))}",
                [f"{drawn}"], "TRIPOD+AI 5a")
    table = read_again(files, kind)
    if table:
        count = Counter(zip(table.column("split"), table.column("label")))
        people = Counter((split, label) for split, label, _ in {(r["split"], r["label"],
                                                                 r["patient"]) for r in table.rows})
        for split in SPLITS:
            told = [f"{label} {count[split, label]} ({people[split, label]})"
                    for label in table.labels]
            add(f"{split}, images (patients)", "; ".join(told), folders,
                "TRIPOD+AI 20a, 21; MI-CLAIM 2")
        same = table.select(split=SPLITS).fingerprint == fingerprint
        add("no patient and no file in two splits", "checked when this card was made, over all "
            "rows; " + ("by fingerprint, these are the data trained on" if same else "**but by "
                        "fingerprint these are not the data trained on**, or some could not be "
                        "read then"), [*folders, *([held] if held else [])],
            "TRIPOD+AI 16; MI-CLAIM 2")
    for k in ("vae", "diffusion"):
        n, where = files.get(k, "run.json", "facts", "n_train")
        if n:
            add(f"images the {k} was trained on", f"{n:,}", [where], "TRIPOD+AI 21")
    notes, where = files.get(kind, "run.json", "facts", "notes")
    if notes is not None:
        add("exclusions and remarks", plain(notes) or "none were written down", [where],
            "TRIPOD+AI 6b, 7")
    ask(add,
        {"why these patients, and why so many": "TRIPOD+AI 6b, 10", "dates and places of "
         "collection": "TRIPOD+AI 5b, 6a", "who assigned the labels, and how": "TRIPOD+AI 8a, 8b"})


def training(add: Items, files: Files) -> None:
    """Preparation, settings, seeds, machines."""
    add.section = "Training"
    size, at = files.get("vae", "config.json", "size")
    if size:
        add("preparation of images", f"shorter side to {size} px, central square, 8 bit; no "
            "padding, metadata dropped",
            [at, "minidiff/data/images.py: square"], "TRIPOD+AI 7; MI-CLAIM 2")
    for kind in ("vae", "diffusion", "samples", "classifier"):
        knobs, at = files.get(kind, "config.json")
        if knobs:
            told = [f"{k} {plain(v) if v not in ('', []) else 'none'}" for k, v in knobs.items()
                    if k not in ("kind", "out", "data")]
            add(f"{kind}: settings and seed", ", ".join(told), [at], "TRIPOD+AI 12c; MI-CLAIM 3, 6")
        for session, at in files.each(kind, "run.json", "sessions"):
            told = [f"{name} {session[name]}" for name in MACHINE if name in session]
            add(f"{kind}: computed by", ", ".join(told), [at], "MI-CLAIM 6")
        path = files.path(kind, "log.jsonl")
        log = runs.read_log(path) if path else []
        if log:
            told = [f"{k} {num(log[-1][k])}" for k in FIGURES if log[-1].get(k) is not None]
            add(f"{kind}: end of the log", ", ".join(told), [f"{path}"], "MI-CLAIM 3")
    ask(add, {"time and energy spent": "MI-CLAIM 6"})


def likeness(add: Items, files: Files) -> None:
    """The verdicts, and the distances behind them."""
    add.section = "Evaluation"
    for v, at in files.each("report", "report.json", "verdict"):
        add(v["question"], f"**{v['answer']}**. {v['text']}", [at], "TRIPOD+AI 23a; MI-CLAIM 4")
    for v, at in files.each("matrix", "matrix.json", "verdicts"):
        said = [f"{name} {v[name]['answer']}" for name in v
                if isinstance(v[name], dict) and "answer" in v[name]]
        add(f"matrix: {v['name']}", ", ".join(said) or v.get("grey") or "not measured", [at],
            "MI-CLAIM 4")
    for d, at in files.each("report", "report.json", "distances"):
        if d["set"] == "synthetic" and d.get("KD") is not None:
            floor = d.get("KD_floor") or dict.fromkeys(("median", "low", "high"))
            add(f"KD, {d['extractor']}, {d['label']}", f"{num(d['KD'])} "
                f"({span(d.get('KD_low'), d.get('KD_high'))}; n = {d['n']} held-out, {d['m']} "
                f"synthetic); real against real {num(floor['median'])} "
                f"({span(floor['low'], floor['high'])})", [at], "TRIPOD+AI 23a; MI-CLAIM 4")
    quality, at = files.get("vae", "vae.json")
    if quality and quality.get("psnr") is not None:
        add("autoencoder, PSNR of held-out images", f"{num(quality['psnr'])} dB (n = "
            f"{quality['n_held_out']})", [f"{at}: psnr", f"{at}: n_held_out"], "MI-CLAIM 4")
    pooled, at = files.get("readers", "readers.json", "pooled")
    if pooled:
        for kind in ("synthetic", "real"):
            s = pooled[kind]
            add(f"readers call {kind} images Good", f"{percent(s['value'])} ({percent(s['low'])} "
                f"to {percent(s['high'])}; n = {s['n']}, {len(pooled['readers'])} "
                f"readers)", [f"{at}.{kind}"], "MI-CLAIM 4")


def subgroups(add: Items, files: Files) -> None:
    """What the judge sees in real and synthetic images, over all and by value."""
    add.section, by = "Subgroups and conditions", "TRIPOD+AI 14, 23a; MI-CLAIM 4"

    def share(v: dict) -> str:
        few = ", **n too small**" if v["n"] < FEW else ""
        return f"{percent(v['accuracy'])} ({percent(v['low'])} to {percent(v['high'])}; n = {v['n']}{few})"

    for a, at in files.each("report", "report.json", "agreement"):
        name = f"{a['variable']}, {a['set']}"
        if a["n"] and a["kind"] == "number":
            add(name, f"r = {num(a['r'])} ({span(a['low'], a['high'])}; n = {a['n']}), mean error "
                f"{num(a['mae'])}", [at], by)
        elif a["n"]:
            add(name, share(a), [at], by)
            for k, v in enumerate(a["by_value"]):
                add(f"{name}: {v['value']}", share(v), [f"{at}.by_value.{k}"], by)


def use(add: Items, files: Files) -> None:
    """What a classifier gained from synthetic images."""
    add.section = "A classifier trained with synthetic images"
    for arm, at in files.each("classifier", "summary.json", "arms"):
        told = [f"{name} {num(arm[name])} ± {num(arm.get(f'{name}_sd'))}"
                for name in ("balanced_accuracy", "auroc_macro") if arm.get(name) is not None]
        add(f"{arm['test_set']}: {arm['arm']}", f"{', '.join(told)} (over {arm['seeds']} seeds; "
            f"trained on {arm['n_train']})", [at], "TRIPOD+AI 23a; MI-CLAIM 4")
    for name in files.get("classifier", "summary.json", "differences")[0] or ():
        for d, at in files.each("classifier", "summary.json", "differences", name):
            said = "resolved" if d["resolved"] else "not resolved"
            add(f"{name}: {d['metric']}, {d['arm']} less {d['against']}",
                f"{signed(d['difference'])} ({span(*d['interval'])}; {d['seeds']} seeds), "
                f"{said}", [at], "TRIPOD+AI 23a; MI-CLAIM 4")


def copies(add: Items, files: Files) -> None:
    """The verdict on memorisation, and the shares behind it."""
    add.section = "Memorisation"
    verdict, at = files.get("report", "report.json", "neighbours", "verdict")
    if verdict:
        add("verdict", verdict, [at], "MI-CLAIM 5")
    else:
        add("verdict", "**not measured**: run `evaluate.py report` on the samples",
            asked_by="MI-CLAIM 5")
    for s, at in files.each("report", "report.json", "neighbours", "spaces"):
        add(f"near-copies, {s['space']}", f"{percent(s['near_share'])} ({percent(s['near_low'])} "
            f"to {percent(s['near_high'])}; n = {s['n']}); of held-out images "
            f"{percent(s['near_heldout_share'])}; of the closest {s['closest']}, "
            f"{s['closest_train']} lie next to a training image, {s['closest_expected']:.1f} by "
            f"chance", [at], "MI-CLAIM 5")


def limits(add: Items, files: Files) -> None:
    """What the audit, the matrix and the notes say against the numbers above."""
    add.section = "Known shortcuts and limits"
    if files.path("audit", "audit.json") is None:
        add("shortcuts", "**not measured**: run `evaluate.py audit` on the data",
            asked_by="MI-CLAIM 5")
    for f, at in files.each("audit", "audit.json", "findings"):
        if f["level"] != "note":
            add(f["kind"], f["text"], [at], "TRIPOD+AI 26; MI-CLAIM 5")
    for s, at in files.each("matrix", "matrix.json", "shortcuts"):
        add(f"{s['label']} by {s['fact']}", f"AUROC {num(s['auroc'])} "
            f"({span(s['low'], s['high'])}; n = {s['n']}, {s['n_rest']})", [at], "MI-CLAIM 5")
    assumed, at = files.get("report", "report.json", "data", "patients_assumed")
    if assumed:
        add("patients", "unknown in some folder, where each image counts as one; intervals are too "
            "narrow", [at], "TRIPOD+AI 26")
    ask(add, {"limits beyond these": "TRIPOD+AI 26"})


def audited(add: Items, files: Files) -> None:
    """Everything that the audit counted."""
    add.section = "Found by the audit"
    if files.path("audit", "audit.json") is None:
        add("audit", "**not made**: run `evaluate.py audit` on the data",
            asked_by="datasheets, composition")
    for name in ("images", "readable", "patients"):
        n, at = files.get("audit", "audit.json", name)
        if n is not None:
            add(name, f"{n:,}", [at], "datasheets, composition")
    for f, at in files.each("audit", "audit.json", "findings"):
        add(f"{f['kind']} ({f['level']})", f["text"], [at], "datasheets, composition")
    tables, at = files.get("audit", "audit.json", "tables")
    for name, cells in (tables or {}).items():
        if name != "all at once":
            told = [f"{value or 'unknown'}: {plain(counts)}" for value, counts in cells.items()]
            add(f"images by {name}", "; ".join(told), [f"{at}.{name}"],
                "datasheets, composition; TRIPOD+AI 20b")
    shares, at = files.get("audit", "audit.json", "missing")
    for name, by_label in (shares or {}).items():
        told = [f"{label} {percent(v)}" for label, v in by_label.items()]
        add(f"empty cells of {name}", ", ".join(told), [f"{at}.{name}"], "TRIPOD+AI 11")
