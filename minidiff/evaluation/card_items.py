"""What stands on a model card and a datasheet: a table of items, each with the guideline that asks
for it, the place in a run's files that answers it, and how the answer is written.

A place is "run/file: key.key"; * stands for each member, and DATA for the run that names the data.
Item and value are Jinja2 templates. They see the member as `it`, the members round it under their
own names (those of the innermost first), and `key`, its number or name.
"""

from typing import NamedTuple

RESEARCH = ("Research only. Not for diagnosis, treatment or triage, nor as a substitute for "
            "patients' images in either.")
FEW = 20  # images, below which a subgroup's figure is marked
RUNS = ("vae", "diffusion", "samples", "classifier")


class Entry(NamedTuple):
    """One row of the table, which gives one item for each member of its place."""

    item: str
    asked_by: str
    place: str = ""
    value: str = "{{ it | plain }}"
    missing: str | None = None    # said of an empty place; "": a person is asked; None: no item


def ask(asked_by: str, *items: str) -> list[Entry]:
    """Items that no file can answer."""
    return [Entry(item, asked_by, missing="") for item in items]


SHARE = ("{{ accuracy | percent }} ({{ low | percent }} to {{ high | percent }}; n = {{ n }}"
         "{% if n < " + str(FEW) + " %}, **n too small**{% endif %})")

MODEL = [
    *(Entry(f"{name}, {knob}", "TRIPOD+AI 22; MI-CLAIM 3", f"{run}/config.json: {knob}")
      for run, name in (("diffusion", "diffusion model"), ("vae", "autoencoder"))
      for knob in ("architecture", "init", "train", "prediction")),
    *(Entry(f"{name}, {fact}", asked_by, f"{run}/{file}", value)
      for run, name, file in (("diffusion", "diffusion model", "model.safetensors"),
                              ("vae", "autoencoder", "vae.safetensors"))
      for fact, asked_by, value in (
          ("numbers in the file of weights", "TRIPOD+AI 22", "{{ '{:,}'.format(it.numbers) }}"),
          ("SHA-256 of that file", "MI-CLAIM 6", "{{ it.sha256 }}"))),
    Entry("conditions, each of which may be unknown", "TRIPOD+AI 9a, 11",
          "diffusion/model.json: variables",
          "{% for v in it %}{{ '; ' if not loop.first }}{{ v.name }} ("
          "{% if 'values' in v %}{{ v['values'] | plain }}"
          "{% else %}{{ span(v.low, v.high) }}, mean {{ v.mean | num }}{% endif %}){% endfor %}"),
    Entry("sampling", "MI-CLAIM 6", "samples/manifest.json: recipe"),
]

DATA = [
    Entry("data folders", "TRIPOD+AI 5a", "DATA/config.json: data", missing=""),
    Entry("fingerprint of the data", "MI-CLAIM 6", "DATA/run.json: facts.data"),
    Entry("these are no patients", "TRIPOD+AI 5a", "again: drawn.*",
          "drawn by a program: {{ it | plain }}"),
    Entry("{{ key }}, images (patients)", "TRIPOD+AI 20a, 21; MI-CLAIM 2", "again: splits.*",
          "{% for label, n, patients in it %}{{ '; ' if not loop.first }}"
          "{{ label }} {{ n }} ({{ patients }}){% endfor %}"),
    Entry("no patient and no file in two splits", "TRIPOD+AI 16; MI-CLAIM 2", "again: trained_on",
          "checked when this card was made, over all rows"
          "{% if it == 'yes' %}; by fingerprint, these are the data trained on"
          "{% elif it == 'no' %}; **but by fingerprint these are not the data trained on**, "
          "or some could not be read then{% endif %}"),
    *(Entry(f"images the {run} was trained on", "TRIPOD+AI 21", f"{run}/run.json: facts.n_train",
            "{{ '{:,}'.format(it) }}") for run in ("vae", "diffusion")),
    Entry("exclusions and remarks", "TRIPOD+AI 6b, 7", "DATA/run.json: facts.notes",
          "{{ it | plain or 'none were written down' }}"),
    *ask("TRIPOD+AI 6b, 10", "why these patients, and why so many"),
    *ask("TRIPOD+AI 5b, 6a", "dates and places of collection"),
    *ask("TRIPOD+AI 8a, 8b", "who assigned the labels, and how"),
]

TRAINING = [
    Entry("preparation of images", "TRIPOD+AI 7; MI-CLAIM 2", "vae/config.json: size",
          "shorter side to {{ it }} px, central square, 8 bit; no padding, metadata dropped"),
    *(entry for run in RUNS for entry in (
        Entry(f"{run}: settings and seed", "TRIPOD+AI 12c; MI-CLAIM 3, 6", f"{run}/config.json",
              "{% for k, v in it.items() if k not in ('kind', 'out', 'data') %}"
              "{{ ', ' if not loop.first }}{{ k }} {{ v | plain or 'none' }}{% endfor %}"),
        Entry(f"{run}: computed by", "MI-CLAIM 6", f"{run}/run.json: sessions.*",
              "{% for k in ('machine', 'threads', 'torch', 'python', 'minidiff', 'commit', "
              "'started', 'command') if k in it %}"
              "{{ ', ' if not loop.first }}{{ k }} {{ it[k] }}{% endfor %}"),
        Entry(f"{run}: end of the log", "MI-CLAIM 3", f"{run}/log.jsonl",
              "{% for k in ('step', 'loss', 'val_loss', 'gap', 'skipped') "
              "if it.get(k) is not none %}"
              "{{ ', ' if not loop.first }}{{ k }} {{ it[k] | num }}{% endfor %}"))),
    *ask("MI-CLAIM 6", "time and energy spent"),
]

MEASURED = "TRIPOD+AI 23a; MI-CLAIM 4"
EVALUATION = [
    Entry("{{ question }}", MEASURED, "report/report.json: verdict.*",
          "**{{ answer }}**. {{ text }}"),
    Entry("matrix: {{ it.name }}", "MI-CLAIM 4", "matrix/matrix.json: verdicts.*",
          "{% for k, v in it.items() if v is mapping and 'answer' in v %}"
          "{{ ', ' if not loop.first }}{{ k }} {{ v.answer }}"
          "{% else %}{{ it.get('too_few') or it.get('grey') or 'not measured' }}{% endfor %}"),
    Entry("KD, {{ extractor }}, {{ label }}", MEASURED, "report/report.json: distances.*",
          "{% if it.set == 'synthetic' and it.KD is defined %}"
          "{{ KD | num }} ({{ span(KD_low, KD_high) }}; n = {{ n }} held-out, {{ m }} synthetic); "
          "floor {% if it.KD_floor %}{{ KD_floor.median | num }} "
          "({{ span(KD_floor.low, KD_floor.high) }}{% if KD_floor.get('n', n) < n %}; "
          "n = {{ KD_floor.n }}, {{ KD_floor.m }}{% endif %}){% else %}–{% endif %}{% endif %}"),
    Entry("autoencoder, PSNR of held-out images", "MI-CLAIM 4", "vae/vae.json",
          "{% if it.psnr is defined %}{{ psnr | num }} dB (n = {{ n_held_out }}){% endif %}"),
    *(Entry(f"readers call {kind} images Good", "MI-CLAIM 4",
            f"readers/readers.json: pooled.{kind}",
            "{{ it.value | percent }} ({{ low | percent }} to {{ high | percent }}; n = {{ n }}, "
            "{{ readers | length }} readers)") for kind in ("synthetic", "real")),
]

BY_GROUP = "TRIPOD+AI 14, 23a; MI-CLAIM 4"
BY_JUDGE = "{{ ', independent judge' if judge == 'independent' }}"
SUBGROUPS = [
    Entry("{{ variable }}, {{ it.set }}" + BY_JUDGE, BY_GROUP, "report/report.json: agreement.*",
          "{% if n and kind == 'number' %}r = {{ r | num }} ({{ span(low, high) }}; n = {{ n }}), "
          "mean error {{ mae | num }}{% elif n %}" + SHARE + "{% endif %}"),
    Entry("{{ variable }}, {{ set }}" + BY_JUDGE + ": {{ it.value }}", BY_GROUP,
          "report/report.json: agreement.*.by_value.*", SHARE),
]

CLASSIFIER = [
    Entry("{{ test_set }}: {{ arm }}", MEASURED, "classifier/summary.json: arms.*",
          "{% for k in ('balanced_accuracy', 'auroc_macro') if it.get(k) is not none %}"
          "{{ ', ' if not loop.first }}{{ k }} {{ it[k] | num }} ± {{ it[k ~ '_sd'] | num }}"
          "{% endfor %} (over {{ seeds }} seeds; trained on {{ n_train }})"),
    Entry("{{ keys[-2] }}: {{ metric }}, {{ arm }} less {{ against }}", MEASURED,
          "classifier/summary.json: differences.*.*",
          "{{ difference | signed }} ({{ span(*interval) }}; {{ seeds }} seeds), "
          "{{ it.answer }}"),
]

MEMORISATION = [
    Entry("verdict", "MI-CLAIM 5", "report/report.json: neighbours.verdict",
          missing="**not measured**: run `evaluate.py report` on the samples"),
    Entry("near-copies, {{ space }}", "MI-CLAIM 5", "report/report.json: neighbours.spaces.*",
          "{{ near_share | percent }} ({{ near_low | percent }} to {{ near_high | percent }}; "
          "n = {{ n }}); of held-out images {{ near_heldout_share | percent }}; of the closest "
          "{{ closest }}, {{ closest_train }} lie next to a training image, "
          "{{ '%.1f' | format(closest_expected) }} by chance"),
]

LIMITS = [
    Entry("shortcuts", "MI-CLAIM 5", "audit/audit.json", "",
          missing="**not measured**: run `evaluate.py audit` on the data"),
    Entry("{{ kind }}", "TRIPOD+AI 26; MI-CLAIM 5", "audit/audit.json: findings.*",
          "{% if level not in ('info', 'note') %}{{ text }}{% endif %}"),
    Entry("{{ it.label }} by {{ it.get('fact', 'its header') }}", "MI-CLAIM 5",
          "matrix/matrix.json: shortcuts.*",
          "AUROC {{ auroc | num }} ({{ span(low, high) }}; n = {{ n }}, {{ n_rest }})"),
    Entry("patients", "TRIPOD+AI 26", "report/report.json: data.patients_assumed",
          "{% if it %}unknown in some folder, where each image counts as one; "
          "intervals are too narrow{% endif %}"),
    *ask("TRIPOD+AI 26", "limits beyond these"),
]

COMPOSED = "datasheets, composition"
AUDIT = [
    Entry("audit", COMPOSED, "audit/audit.json", "",
          missing="**not made**: run `evaluate.py audit` on the data"),
    *(Entry(name, COMPOSED, f"audit/audit.json: {name}", "{{ '{:,}'.format(it) }}")
      for name in ("images", "readable", "patients")),
    Entry("{{ kind }} ({{ level }})", COMPOSED, "audit/audit.json: findings.*", "{{ text }}"),
    Entry("images by {{ key }}", f"{COMPOSED}; TRIPOD+AI 20b", "audit/audit.json: tables.*",
          "{% if key != 'all at once' %}{% for cell, counts in it.items() %}"
          "{{ '; ' if not loop.first }}{{ cell or 'unknown' }}: {{ counts | plain }}"
          "{% endfor %}{% endif %}"),
    Entry("empty cells of {{ key }}", "TRIPOD+AI 11", "audit/audit.json: missing.*",
          "{% for label, v in it.items() %}{{ ', ' if not loop.first }}"
          "{{ label }} {{ v | percent }}{% endfor %}"),
]

SYNTHETIC = [
    Entry("images", COMPOSED, "report/report.json: samples",
          "{{ n }}: {{ labels | plain }}"),
    *(Entry(name, "datasheets, collection", f"samples/manifest.json: {name}")
      for name in ("model", "recipe", "rejects")),
    Entry("yield", "datasheets, collection", "samples/manifest.json: yield",
          "{{ it | percent }} of the images drawn were kept"),
    Entry("filter: {{ by }}", "datasheets, collection", "samples/manifest.json: filters.*",
          "{{ rejects }} images rejected; gate: {{ gate }}; it knew {{ train }} training and "
          "{{ held_out }} held-out images{% if judge %}; judge {{ judge }}{% endif %}"),
    Entry("images that its model was trained on", "datasheets, collection",
          "samples/manifest.json: trained_on", "{{ '{:,}'.format(it | length) }}, by SHA-256"),
]

CARDS = {
    "model card": {
        "Model": MODEL,
        "Intended use": [
            Entry("use", "TRIPOD+AI 3b; MI-CLAIM 1", "again: use"),
            *ask("TRIPOD+AI 3a, 4; MI-CLAIM 1", "question of the study"),
            *ask("TRIPOD+AI 3b, 27b", "intended users"),
            *ask("TRIPOD+AI 3c", "known inequalities between groups"),
            *ask("TRIPOD+AI 6a", "clinical setting")],
        "Training data": DATA,
        "Training": TRAINING,
        "Evaluation": EVALUATION,
        "Subgroups and conditions": SUBGROUPS,
        "A classifier trained with synthetic images": CLASSIFIER,
        "Memorisation": MEMORISATION,
        "Known shortcuts and limits": LIMITS,
        "For a person to say": [
            *ask("TRIPOD+AI 17", "ethical approval and consent"),
            *ask("TRIPOD+AI 18a", "funding"),
            *ask("TRIPOD+AI 18b", "conflicts of interest"),
            *ask("TRIPOD+AI 18c, 18d", "protocol and registration"),
            *ask("TRIPOD+AI 18e, 18f", "sharing of data and code"),
            *ask("TRIPOD+AI 19", "patient and public involvement"),
            *ask("TRIPOD+AI 25", "interpretation"),
            *ask("model cards", "who is responsible, and how to reach them",
                 "licence of the model")],
    },
    "datasheet": {
        "Motivation": ask("datasheets, motivation", "why it was made, by whom, for whom",
                          "funding"),
        "Composition": DATA,
        "Found by the audit": AUDIT,
        "The synthetic set": SYNTHETIC,
        "Collection": ask("datasheets, collection", "how and when images were acquired",
                          "consent, and its withdrawal", "ethical review"),
        "Uses": ask("datasheets, uses", "tasks it was used for",
                    "what it should not be used for, beyond diagnosis"),
        "Distribution and maintenance": ask(
            "datasheets, distribution and maintenance", "licence and terms",
            "how it is distributed", "who maintains it, and errata"),
    },
}
SUMMARY = ("use", "data folders", "images the diffusion was trained on",
           "no patient and no file in two splits", "sampling", "verdict", "shortcuts", "shortcut",
           "readers call synthetic images Good", "diffusion model, architecture")
