"""Did synthetic images help? Train one classifier with and without them, and compare.

    python classify.py                               the demo → runs/demo/classifier
    python classify.py --root runs/x --external DIR2 --steps 400   tested at another hospital, too
    python classify.py --arms real real+1xduplicates real+.5xsynthetic synthetic-then-real
    python classify.py --root runs/x --synthetic a=DIR2 b=DIR3 --arms real+a real+b   two sources
    python classify.py --root runs/x --synthetic a=DIR0,DIR1,DIR2 --arms real real+a --seeds 15
                                                     three generators of a, five classifiers each
    python classify.py --root runs/x --other b=DIR2 --arms real@5% b-then-real@5%   real ones first
    python classify.py --data DIR --arms real --out runs/x/baseline   without synthetic images
    python classify.py subset --data DIR --keep covid=25 --out DIR25   fewer patients, for real@25
    python classify.py predict --model runs/x/classifier --data NEW --out new.csv
    python classify.py lungs --root runs/x   a network that finds lungs, for --standardise lungs
    torchrun --standalone --nproc-per-node 8 -- classify.py --seeds 8   pairs are dealt to the GPUs

The arms: minidiff/classification/arms.py. Finished pairs of arm and seed are kept: to resume, or to
add --arms or --seeds, run the command again with the same --out. It writes study.html, its tables
as CSV, results.json, summary.json, arms/ (predictors, logits), and judge/: a predictor of label and
conditions trained on real training patients only, with which evaluate.py asks whether samples show
what they were asked to show.
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import minidiff.threads  # noqa: F401  before torch, which it tells how its threads wait

from minidiff import config, distributed, runs
from minidiff import variables as var
from minidiff.classification import arms as kinds
from minidiff.classification import inputs, lungs, study
from minidiff.classification.assess import assess
from minidiff.classification.compare import BENEFIT, Declared, Primary, parse
from minidiff.classification.inputs import Inputs
from minidiff.classification.invariance import Invariance
from minidiff.classification.judge_agreement import judge_agreement
from minidiff.classification.predict import PredictConfig, predict
from minidiff.classification.predictor import Predictor, balance, begin, fit, weights_of
from minidiff.classification.scores import Benefit
from minidiff.classification.shortcuts import STEPS, shortcut_audit
from minidiff.convolution import LEAST
from minidiff.data import standardise
from minidiff.data.dataset import glance
from minidiff.data.subset import SubsetConfig, write_subset
from minidiff.errors import InputError
from minidiff.evaluation.pages.study import study_page
from minidiff.evaluation.pages.study_pictures import gallery
from minidiff.evaluation.pages.study_tables import csv_tables, printed
from minidiff.evaluation.study_verdicts import said
from minidiff.root import Reading, Rooted, then
from minidiff.training.device import pick_device
from minidiff.training.precision import PrecisionName

# knobs that do not change what is finished
FREE = ("arms", "seeds", "device", "lungs", "primary", "worth", "prevalence", "false_alarms")


@dataclass(frozen=True)
class Config(Reading, Rooted):
    data: tuple[str, ...] = ()        # real data sets, with their splits; none: the root's
    synthetic: tuple[str, ...] = ("ROOT/samples",)  # [NAME=]DIR, or [NAME=]DIR,DIR to pool two
    other: tuple[str, ...] = ()       # NAME=DIR: other patients' real images to train on, too
    external: tuple[str, ...] = ()    # further test sets, each used whole; no patient of training
    hold_out: str = ""                # column=value: rows that are a test set, e.g. source=hannover
    out: str = "ROOT/classifier"      # run folder
    arms: tuple[str, ...] = ()        # none: real, and it with duplicates and with synthetic images
    primary: str = "auto"             # ARM:ARM[@SET][:FIGURE], tested first; auto: to duplicates
    worth: float = 0.0                # its smallest gain of interest, in points; 0: none
    prevalence: float = 0.0           # of --positive where the net benefit is asked for; 0: nowhere
    false_alarms: float = 10.0        # in net benefit as bad as one missed case
    target: str = "label"             # column to classify; cells a|b make it multi-label
    positive: str = ""                # label of interest; none: the rarest in training
    even: tuple[str, ...] = ("view",)  # columns of which the label says nothing in arms real-even
    condition: tuple[str, ...] = ("label", "sex", "age", "view")  # what the judge reads
    standardise: tuple[str, ...] = ()  # make images alike: lungs or masked, then equalise, local
    lungs: str = "ROOT/lungs"         # network that finds them, of `classify.py lungs`
    invariant: str = ""               # column over which features of a label lie alike, e.g. source
    init: str = ""                    # start: arms/ARM/SEED of a run, or resnet18 of torchvision
    size: int = 0                     # side of all images, px; 0: that of the root's runs, else 64
    width: int = 16                   # channels of the first layer, 8 or more; resnet18 has 64
    steps: int = 240                  # optimiser steps, the same for every arm
    batch: int = 32                   # images a step
    lr: float = 2e-3                  # AdamW peak; 20 % warm-up, then cosine
    seeds: int = 4                    # classifiers an arm; a multiple of the generators pooled
    seed: int = 0                     # the first of them; also of choosing patients, of a split
    near_copies: Literal["refuse", "drop"] = "refuse"  # test images that repeat a training image
    skip_bad: bool = False            # leave unreadable images out, listed, instead of refusing
    precision: PrecisionName = "auto"  # auto: bf16 or fp16 on a GPU, fp32 on the CPU
    device: str = "auto"              # auto, cpu, cuda, cuda:1 …


def run_study(cfg: Config) -> None:
    """Compare the arms on held-out patients, after a look at what a shortcut could tell."""
    distributed.start()
    usual = not cfg.arms
    synthetic = kinds.sources(cfg.synthetic)
    folders = synthetic | kinds.others(cfg.other, synthetic)
    cfg = replace(cfg, size=cfg.size or side(cfg.root),
                  arms=cfg.arms or kinds.usual(list(synthetic)))
    arms = check(cfg, folders)
    runs.refuse_other(cfg.out, cfg, "classifier", (*FREE, "condition"))
    used = {name: folder for name, folder in folders.items() if any(
        name == arm.source or (arm.added == kinds.DUPLICATES and not arm.factor) for arm in arms)}
    with distributed.rank0_first():  # a split that has to be made is made once
        data = inputs.read(cfg.data, {name: used[name] for name in synthetic if name in used},
                           cfg.external, cfg, size=cfg.size, seed=cfg.seed,
                           out=f"{cfg.root}/classifier", target=cfg.target, hold_out=cfg.hold_out,
                           others={name: used[name][0] for name in used if name not in synthetic},
                           near_copies=cfg.near_copies, skip_bad=cfg.skip_bad)
    found = lungs.kept_whole(lungs.finder(cfg.standardise, cfg.lungs),
                             {name: images.pixels for name, images in data.sets.items()}
                             | {name if len(own) == 1 else f"{name} {k}": images.pixels
                                for name, own in data.sources.items()
                                for k, images in enumerate(own)})
    data = replace(data, notes=[*data.notes, *found])
    cfg = replace(cfg, condition=var.usable(cfg.condition, data.sets["train"].rows))
    if usual:
        made = next(iter(data.made_for(0).values()), None)
        arms = [kinds.parse(name, list(folders)) for name in kinds.as_many_as_there_are(
            cfg.arms, data.sets["train"], made, positive_of(cfg, data))]
    known = check_read(cfg, arms, data)
    recipe = study.Recipe(cfg.size, cfg.width, cfg.steps, cfg.batch, cfg.lr, positive_of(cfg, data),
                          cfg.even, cfg.init, cfg.precision, str(pick_device(cfg.device)),
                          cfg.standardise, cfg.lungs, cfg.invariant, cfg.seed)
    out, main = Path(cfg.out), not distributed.rank()
    with distributed.rank0_first():  # no rank trains into a folder that is refused
        if main:
            open_run(cfg, data)
    first = declared(cfg, arms, data, out)
    if main:
        with distributed.independent():
            audit = audited(cfg, out, data)
            judge = train_judge(cfg, out / "judge", data, known)
    pairs = [(arm, seed) for seed in range(cfg.seed, cfg.seed + cfg.seeds) for arm in arms]
    for arm, seed in pairs[distributed.rank() :: distributed.world()]:
        with distributed.independent():
            study.train_pair(study.folder_of(out, arm.name, seed), arm, seed, data, recipe,
                             f"{arm.name}, seed {seed}")
    distributed.wait()
    if main:
        trained = {arm.name: [study.train_pair(study.folder_of(out, arm.name, seed), arm, seed,
                                               data, recipe) for own, seed in pairs if own is arm]
                   for arm in arms}
        results, summary = assess(data, arms, trained, recipe, out, first)
        write(out, data, results, said({**summary, "audit": audit, "judge": judge,
                                        "recipe": asdict(recipe)}))
        print(f"\n\n{out / 'study.html'}\n{then('evaluate', cfg, 'classifier')}")
    distributed.stop()


def open_run(cfg: Config, data: Inputs) -> None:
    """Refuse a folder of another study, and print what this one is made of."""
    start = Path(cfg.init, "predictor.safetensors" if Path(cfg.init).is_dir() else "")
    tables = {name: data.tables[name] for name in data.sets}
    runs.open_run(cfg.out, cfg, "classifier", free=FREE,
                  init=runs.sha256(start) if cfg.init else "",
                  **({"finder": runs.sha256(Path(cfg.lungs, lungs.FILE))}
                     if standardise.needs_lungs(cfg.standardise) else {}),
                  data={name: table.fingerprint for name, table in tables.items()})
    print(glance(cfg.data, tables, root=Path(cfg.out).parent))
    print("".join(f"  {note}\n" for note in data.notes if note.startswith(lungs.FOUND)), end="")
    rarest = "" if cfg.positive else ", the rarest in training (--positive)"
    print(f"label of interest: {positive_of(cfg, data)}{rarest}")


def write(out: Path, data: Inputs, results: list[dict], summary: dict) -> None:
    runs.write_json(out / "results.json", results)
    runs.write_json(out / "summary.json", summary)
    for name, text in csv_tables(summary, results).items():
        runs.write_atomic(out / f"{name}.csv", text)
    runs.write_atomic(out / "study.html",
                      study_page(summary, results, gallery(data, summary, out)))
    print(printed(summary))


def side(root: str) -> int:
    """Side of the images of an experiment, px: that of its diffusion model or its VAE, else 64."""
    found = [path for path in (Path(root) / "diffusion" / "model.json",
                               Path(root) / "vae" / "vae.json") if path.is_file()]
    return runs.read_json(found[0])["size"] if found else 64


def check(cfg: Config, folders: dict[str, list[str]]) -> list[kinds.Arm]:
    """What can be refused before anything is read; the arms."""
    arms = [kinds.parse(name, list(folders)) for name in cfg.arms]
    if not arms or len(set(cfg.arms)) < len(arms):
        raise InputError(f"arms {', '.join(cfg.arms) or 'none'}: name each of them once, and one "
                         "or more")
    if any("scratch" in arm.words for arm in arms) and not cfg.init:
        raise InputError("--arms real-scratch: without --init every arm starts from random weights")
    if any("even" in arm.words for arm in arms) and not cfg.even:
        raise InputError("--arms real-even needs --even columns, e.g. view")
    if cfg.init:
        weights_of(cfg.init)
    standardise.check(cfg.standardise)
    lungs.finder(cfg.standardise, cfg.lungs)
    pooled = sorted({len(own) for own in folders.values()} - {1})
    if len(pooled) > 1:
        raise InputError(f"--synthetic pools {' and '.join(map(str, pooled))} generators; all "
                         "names that pool several must pool equally many")
    if pooled and cfg.seeds % pooled[0]:
        raise InputError(f"--seeds {cfg.seeds}: --synthetic pools {pooled[0]} generators, and each "
                         f"gets equally many classifiers; allowed are {pooled[0]}, {2 * pooled[0]}"
                         ", and so on")
    var.check_names(cfg.condition)
    # one image: no norm
    for name, least in {"size": 32, "width": LEAST, "steps": 1, "batch": 2, "seeds": 1}.items():
        if getattr(cfg, name) < least:
            raise InputError(f"{name} is {getattr(cfg, name)}; allowed are {least} and more")
    if not 0 <= cfg.worth < 100:
        raise InputError(f"--worth {cfg.worth:g}; allowed are 0, for none, to below 100 points")
    if not 0 <= cfg.prevalence < 1:
        raise InputError(f"--prevalence {cfg.prevalence:g}; allowed are 0, for no net benefit, to "
                         "below 1, e.g. .05 for 5 %")
    if not 0 < cfg.false_alarms < math.inf:
        raise InputError(f"--false-alarms {cfg.false_alarms:g}; allowed is any number above 0")
    return arms


def check_read(cfg: Config, arms: list[kinds.Arm], data: Inputs) -> list[var.Variable]:
    """What can be refused before anything is written; the variables of the judge."""
    train = data.sets["train"]
    if any("even" in arm.words for arm in arms):
        if not data.exclusive:
            raise InputError("--arms real-even weighs labels that exclude each other; "
                             f"{cfg.target} names findings that may be there together")
        for name in cfg.even:
            if not any(row.get(name, "") for row in train.rows):
                raise InputError(f"--even {name}: no training image has it; there are "
                                 f"{', '.join(train.rows[0])}")
    for arm in arms:  # has each folder enough images, for the share that each network draws?
        for k in range(cfg.seeds if arm.share else data.generators.get(arm.source, 1)):
            for stage in kinds.training_set(arm, train, data.made_for(k), seed=cfg.seed + k,
                                            positive=positive_of(cfg, data), subset_seed=cfg.seed):
                if cfg.invariant:
                    Invariance(stage.rows, cfg.invariant)
    if cfg.init:
        begin(Predictor([data.target], width=cfg.width, size=cfg.size), cfg.init)
    known = [data.target, *(var.infer(name, [row.get(name, "") for row in train.rows])
                            for name in cfg.condition if name != "label")]
    var.encode(known, data.sets["test"].rows)
    return known


def declared(cfg: Config, arms: list[kinds.Arm], data: Inputs, out: Path) -> Declared:
    """The primary comparison and its smallest gain of interest, written down before training and
    fixed from then on."""
    benefit = Benefit(cfg.prevalence, cfg.false_alarms) if cfg.prevalence else None
    matched = (f"{a.name}:{b.name}" for a in arms for b in arms if a.source and a.added
               and b.added == kinds.DUPLICATES and (a.base, a.factor) == (b.base, b.factor))
    text = next(matched, "") if cfg.primary == "auto" else cfg.primary
    wanted = parse(text, [arm.name for arm in arms], list(data.tests), data.exclusive,
                   bool(benefit))
    path, found, worth = out / "primary.json", wanted, cfg.worth
    if path.exists():
        kept = runs.read_json(path)
        worth, at = kept.pop("worth", 0.0), kept.pop("benefit", None)
        found = Primary(**kept)
        if at and at != (benefit and vars(benefit)):
            raise InputError(f"{path} declares --prevalence {at['prevalence']:g} --false-alarms "
                             f"{at['false_alarms']:g}, and arms are trained; give these, or "
                             "another --out")
        if cfg.primary != "auto" and found != wanted:
            raise InputError(f"--primary {cfg.primary}: {path} declares {found}, and arms are "
                             "trained; give another --out")
        if cfg.worth not in (0, worth):
            raise InputError(f"--worth {cfg.worth:g}: {path} declares {worth:g}, and arms are "
                             "trained; give another --out")
    elif wanted and all((out / "arms" / name).exists() for name in (wanted.arm, wanted.against)):
        if cfg.primary != "auto":
            raise InputError(f"--primary {cfg.primary}: both arms are trained in {out}; declare it "
                             "before, with another --out")
        found = None
    if found and {found.arm, found.against} - {arm.name for arm in arms}:
        raise InputError(f"{path} declares {found}: name both arms in --arms, or give another "
                         "--out")
    if worth and not found:
        raise InputError(f"--worth {worth:g} needs a primary comparison; name one with --primary")
    if found and not distributed.rank():
        print(f"primary comparison: {found}"
              + (f"; smallest gain of interest: {worth:g} points" if worth else ""))
        if not path.exists():
            at = {"benefit": vars(benefit)} if found.metric == BENEFIT else {}
            runs.write_json(path, {**asdict(found), "worth": worth, **at})
    return Declared(found, worth, benefit)


def positive_of(cfg: Config, data: Inputs) -> str:
    """The label of interest: as asked, or the rarest in training."""
    if cfg.positive and cfg.positive not in data.labels:
        raise InputError(f"--positive {cfg.positive}: training has {', '.join(data.labels)}")
    return cfg.positive or min(zip(data.truth("train").sum(0).tolist(), data.labels))[1]


def audited(cfg: Config, out: Path, data: Inputs) -> dict:
    """What can be predicted without seeing the lungs; printed before training, and kept."""
    if (out / "audit.json").exists():
        found = runs.read_json(out / "audit.json")
    else:
        # these are what is to be told
        columns = [name for name in cfg.condition if name not in ("label", cfg.target)]
        found = shortcut_audit(data.sets["train"], data.tests, target=data.target,
                               columns=columns, seed=cfg.seed, size=cfg.size,
                               steps=min(cfg.steps, STEPS), device=pick_device(cfg.device))
        runs.write_json(out / "audit.json", found)
    print("\n".join(found["text"]))
    return found


def train_judge(cfg: Config, folder: Path, data: Inputs, known: list[var.Variable]) -> list[dict]:
    """Train and save the judge, or read a finished one; its agreement with the test images.

    The sha256 of its training files is kept beside it: no image that it is asked to judge should be
    among them.
    """
    train, test = data.sets["train"], data.sets["test"]
    runs.write_json(folder / "trained_on.json", sorted(set(train.hashes)))
    if (folder / "agreement.json").exists():
        return runs.read_json(folder / "agreement.json")
    judge = Predictor(known, width=cfg.width, size=cfg.size, seed=cfg.seed,
                      standardise=cfg.standardise, lungs=lungs.finder(
                          cfg.standardise, cfg.lungs)).to(pick_device(cfg.device))
    labels = var.encode(known, train.rows)
    log = fit(judge, train.pixels, labels, weights=balance(data.target, labels),
              steps=5 * cfg.steps // 2, batch=cfg.batch, lr=cfg.lr, seed=cfg.seed,
              progress="judge", precision=cfg.precision)
    found = judge_agreement(judge, test.pixels, var.encode(known, test.rows), "held-out real",
                            test.patients)
    judge.save(folder)
    runs.write_json(folder / "log.json", log)
    # last: its presence says that the judge is finished
    runs.write_json(folder / "agreement.json", found)
    return found


VERBS = {"study": (Config, run_study), "subset": (SubsetConfig, write_subset),
         "predict": (PredictConfig, predict), "lungs": (lungs.Config, lungs.train_lungs)}

if __name__ == "__main__":
    config.main(VERBS, default="study", doc=__doc__)
