"""Findings: several of a column at once, from the cell of a table to what a report says of them."""

import math
import re
from collections import Counter

import numpy as np
import public_sets as sets
import pytest
import torch

import classify
import evaluate
import sample
import train
from minidiff import runs
from minidiff import variables as var
from minidiff.classification.judge_agreement import judge_agreement
from minidiff.data import baselines, images, phantom
from minidiff.data.dataset import glance
from minidiff.data.table import Table, read_table
from minidiff.diffusion import unet
from minidiff.diffusion.model import from_model, from_scratch
from minidiff.diffusion.public.export import finished_contexts
from minidiff.errors import InputError
from minidiff.evaluation import verdicts
from minidiff.evaluation.metrics import agreement, by_condition
from minidiff.sampling import plan
from minidiff.statistics import auroc
from minidiff.variables import Category, Findings

SEEN = Findings("seen", ("edema", "effusion", "mass"))
LABEL = Category("label", ("covid", "normal"))
CELLS = ["edema", "mass|edema", "", "none", "effusion", "No Finding", "edema|effusion|mass",
         "edema | effusion"]
CODES = [1, 5, -1, 0, 2, 0, 7, 3]
ROWS = [{"seen": cell} for cell in CELLS]


def test_a_cell_becomes_bits():
    assert var.infer("seen", CELLS) == SEEN
    cells = var.encode([SEEN], ROWS)["seen"]
    assert cells.dtype == torch.int64 and cells.tolist() == CODES
    assert SEEN.bits(cells)[[0, 1, 2, 3, 6]].tolist() == [[True, False, False], [True, False, True],
                                                          [False] * 3, [False] * 3, [True] * 3]
    dropped = var.drop([SEEN], {"seen": cells},
                       torch.tensor([[k == 1] for k in range(len(cells))]))["seen"]
    assert dropped.tolist() == [1, var.NULL, *CODES[2:]]
    assert not SEEN.bits(dropped)[1].any()
    assert var.from_json(var.to_json([LABEL, SEEN])) == [LABEL, SEEN]


def test_sixty_fit_and_no_more():
    names = tuple(f"f{k:02d}" for k in range(60))
    v = var.infer("seen", ["|".join(names), "f00"])
    cells = var.encode([v],
                       [{"seen": "|".join(names)}, {"seen": "f59"}, {"seen": "f00|f59"}])["seen"]
    assert v.values == names and cells.tolist() == [2**60 - 1, 2**59, 2**59 + 1]
    assert v.bits(cells).sum(1).tolist() == [60, 1, 2]
    assert v.bits(cells[2:]).nonzero()[:, 1].tolist() == [0, 59]
    with pytest.raises(InputError,
                       match="condition 'seen' has 61 different findings; it may have 60"):
        var.infer("seen", ["|".join(names), "another"])
    with pytest.raises(InputError, match="61 different findings"):
        var.merge([v], [Findings("seen", ("another",))])


def test_what_is_inferred_and_what_is_refused():
    # nobody has two: one of them each
    assert isinstance(var.infer("seen", ["edema", "mass"]), Category)
    assert var.infer("seen", ["edema", "mass"], SEEN) == Findings("seen", ("edema", "mass"))
    assert var.infer("seen", ["", ""], SEEN) == SEEN
    assert var.infer("label", ["a|b", "a"]) == Findings("label", ("a", "b"))
    # of a model that took them for classes
    old = Category("label", ("a", "a|b"))
    assert var.infer("label", ["a|b", "a"], old) == old
    for cells, said in ((["a|b", "b|a", ""], "one value only, 'a|b'"),
                        (["a|", "b"], "seen 'a|' has an empty finding"),
                        (["none|a", "b"], "seen 'none|a' says none and a finding")):
        with pytest.raises(InputError, match=said.replace("|", r"\|")):
            var.infer("seen", cells)
    with pytest.raises(InputError, match="m.csv:7: seen 'oedema' is not one of edema, effusion, "
                       "mass; nearest: edema"):
        var.encode([SEEN], [{"seen": "mass|oedema", "where": "m.csv:7"}])


def test_merging_keeps_the_places_of_the_bits():
    (merged,) = var.merge([SEEN], [Findings("seen", ("atelectasis", "mass"))])
    assert merged.values == ("edema", "effusion", "mass", "atelectasis")
    assert torch.equal(var.encode([merged], ROWS)["seen"], var.encode([SEEN], ROWS)["seen"])
    with pytest.raises(InputError, match="'seen' is of kind category here and of kind findings in "
                       "the model to go on from"):
        var.merge([SEEN], [Category("seen", ("edema", "mass"))])


def old_model():
    model, g = from_scratch(unet.TINY, [LABEL, SEEN], seed=0), torch.Generator().manual_seed(1)
    for projection in model.conditioner.projections:
        torch.nn.init.normal_(projection.weight, std=0.1, generator=g)
    return model.eval().requires_grad_(False)


def test_the_context_is_a_sum_over_what_is_present():
    c = old_model().conditioner
    cells = ["edema", "mass", "edema|mass", "none", "", "edema|effusion|mass", "effusion"]
    labels = {**c.null(7), **var.encode([SEEN], [{"seen": cell} for cell in cells])}
    added = (c(labels) - c.null_context)[:, 1]
    edema, mass, both, none, unknown, three, effusion = added
    assert torch.allclose(both, edema + mass,
                          atol=1e-6) and torch.allclose(three, edema + mass + effusion, atol=1e-6)
    different = torch.cdist(added, added)[~torch.eye(7, dtype=torch.bool)]
    # none is not null, nor unknown none
    assert different.min() > 0.1 * different.median()
    assert none.norm() > 0.1 * edema.norm() and unknown.norm() > 0.1 * edema.norm()
    assert torch.equal(c(c.null(2)), c.null_context.expand(2, -1, -1))


def test_going_on_with_more_findings_begins_with_the_old_output_bit_for_bit():
    old = old_model()
    variables = var.merge([LABEL, SEEN], [LABEL, Findings("seen", ("air", "mass", "nodule"))])
    model = from_model(old, variables, seed=7)
    rows = [{"label": "covid", **row} for row in ROWS]
    context = model.conditioner(var.encode(variables, rows))
    assert torch.equal(context, old.conditioner(var.encode([LABEL, SEEN], rows)))
    more = model.conditioner(var.encode(variables, [{"label": "covid", "seen": "mass|nodule"}]))
    assert torch.equal(more, old.conditioner(var.encode([LABEL, SEEN],
                                                        [{"label": "covid", "seen": "mass"}])))
    (more * torch.randn(more.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    gradient = model.conditioner.embeddings[1].weight.grad.abs().amax(1)
    # unknown, none, 3 old, 2 new
    assert (gradient > 0).tolist() == [False, False, False, False, True, False, True]


def test_plans_draw_fix_and_drop_them():
    rng = np.random.default_rng(0)
    known = [{"label": label, "seen": rng.choice(CELLS)} for label in LABEL.values
             for _ in range(60)]
    rows = plan.plan([LABEL, SEEN], known, per_label=60)
    for label in LABEL.values:  # as many images as rows: each row once
        assert sorted(r["seen"] for r in rows if r["label"] == label) == sorted(
            r["seen"] for r in known if r["label"] == label)
    for given, code in (("seen=mass|edema", 5), ("seen=none", 0), ("seen=", -1), ("seen=null", -2)):
        rows = plan.plan([LABEL, SEEN], known, per_label=3, given=(given,))
        assert plan.encode([LABEL, SEEN], rows)["seen"].tolist() == [code] * 6
    with pytest.raises(InputError, match="--given: seen 'oedema' is not one of"):
        plan.plan([LABEL, SEEN], known, given=("seen=mass|oedema",))


LABELS = Findings("label", ("edema", "effusion", "mass"))


def known_labels(n=400):
    rng = np.random.default_rng(1)
    cells = ["none", "edema", "effusion|edema", "mass", "mass|effusion"]
    return [{"label": cell, "seen": ""} for cell in rng.choice(cells, n, p=[.4, .3, .2, .05, .05])]


def test_labels_that_are_findings_are_drawn_as_often_as_they_are_or_balanced():
    known = known_labels()
    rows = plan.plan([LABELS], known, per_label=400)
    assert len(rows) == 1200
    times = Counter(row["label"] for row in known)
    assert Counter(row["label"] for row in rows) == {cell: 3 * n for cell, n in times.items()}
    assert {row["file_name"].split("/")[1] for row in rows} >= {"none", "effusion%7Cedema"}
    for part in (rows[:100], rows[100:200]):  # every set has them all
        assert {row["label"] for row in part} == set(times)
    even = plan.plan([LABELS], known, sets=6, balance=1.0)
    bits = LABELS.bits(plan.encode([LABELS], even)["label"]).float().mean(0)
    before = LABELS.bits(plan.encode([LABELS], known)["label"]).float().mean(0)
    assert len(even) == 600 and (bits - before.mean()).abs().max() < 0.01
    assert before.max() > 4 * before.min()
    with_sex = plan.plan([LABELS, Category("sex", ("F", "M"))],
                         [{**row, "sex": "FM"[k % 2]} for k, row in enumerate(known)],
                         per_label=20, independent=["sex"])
    assert Counter(row["sex"] for row in with_sex) == {"F": 30, "M": 30}


def test_combinations_are_asked_for_by_name_also_those_that_training_never_had():
    known = known_labels()
    rows = plan.plan([LABELS], known, per_label=5, labels=["edema|effusion", "edema|mass", "none"])
    # the first as the rows spell it
    assert Counter(row["label"] for row in rows) == {"effusion|edema": 5, "edema|mass": 5,
                                                     "none": 5}
    for labels, balance, said in (
            (["edema|oedema"], 0, "--label: label 'oedema' is not one of edema, effusion, mass"),
            (["edema|none"], 0, "says none and a finding"),
            (["edema|effusion", "effusion|edema"], 0, "one is named twice"),
            (["edema"], 1, "--balance 1: it is for findings that are drawn, and --label names")):
        with pytest.raises(InputError, match=re.escape(said)):
            plan.plan([LABELS], known, labels=labels, balance=balance)
    with pytest.raises(InputError, match="labels that exclude each other get --per-label images"):
        plan.plan([LABEL], [{"label": "covid"}], balance=1)


def test_a_judge_reads_every_finding_and_the_answer_needs_each():
    class Judge:
        variables = [LABELS]

        def __init__(self, p):
            self.p = torch.tensor(p)

        def predict(self, images):
            return {"label": self.p}

    labels = ["edema", "mass|edema", "none", "none"]
    judge = Judge([[.9, .1, .1], [.9, .2, .3], [.4, .4, .2], [.6, .1, .1]])
    assert agreement.recognised(judge, None, labels).tolist() == [True, False, True, False]
    assert agreement.certainty(judge, labels, None) == pytest.approx(
        [.9 * .9 * .9, .9 * .8 * .3, .6 * .6 * .8, .4 * .9 * .9], rel=1e-5)
    assert agreement.reads(judge, labels) and not agreement.reads(judge, ["edema|air"])
    with pytest.raises(InputError, match="knows edema, effusion, mass, not air"):
        agreement.recognised(judge, None, ["edema|air"])

    cells = torch.arange(400) % 8

    def verdict(made):
        read = [judge_agreement(Judge(p.tolist()), cells, {"label": cells}, which)[0]
                for p, which in ((blind, "held-out real"), (made, "synthetic"))]
        return next(v["answer"] for v in verdicts._agreement(read, {}) if v["about"] == "label")

    # a judge that sees nothing is right as often on either side, and that is no yes
    blind = torch.rand(400, 3, generator=torch.Generator().manual_seed(0)) / 2.1
    assert verdict(blind) == "not resolved"
    assert verdict(LABELS.bits(cells).float()) == "yes"
    one_absent = torch.where(torch.tensor([True, True, False]), LABELS.bits(cells).float(), blind)
    assert verdict(one_absent) == "not resolved"
    (row,) = judge_agreement(Judge(one_absent.tolist()), cells, {"label": cells}, "synthetic")
    assert [(v["accuracy"], v["without"], v["n_without"]) for v in row["by_value"]] == [
        (1, 0, 200), (1, 0, 200), (0, 0, 200)]


def test_labels_count_by_finding():
    assert var.labels_in(["b|a", "No Finding", "b"]) == [["a", "b"], ["none"], ["b"]]
    assert var.labels_in(["b", "No Finding"]) == [["b"], ["No Finding"]]
    x, labels = np.zeros((80, 1)), ["a|b", "a", "none", "b"] * 20
    x[::4] = x[1::4] = 1   # tells a
    found = baselines.baselines({"header": x}, labels, [str(k) for k in range(80)])
    assert {b["label"]: (b["n"], b["auroc"]) for b in found} == {
        "a": (40, 1.0), "b": (40, pytest.approx(.5, abs=.1)), "none": (20, found[2]["auroc"])}
    table = {"train": Table([{"label": "a|b", "patient": "p", "file": "f"}])}
    assert "a  b  images" in glance(["d"], table)


def test_phantoms_have_findings_as_often_as_asked_and_each_by_itself(tmp_path):
    asked = {"nodule": 0.5, "covid": 0.25}
    rows = read_table(phantom.write(tmp_path / "p", n=400, size=32, findings=asked)).rows
    v = var.infer("label", [row["label"] for row in rows])
    assert v == Findings("label", ("covid", "nodule"))
    there = v.bits(var.encode([v], rows)["label"]).double()
    for share, p in zip(there.mean(0), (0.25, 0.5)):
        assert abs(share - p) < 4 * (p * (1 - p) / 360) ** 0.5
    assert abs(there.T.corrcoef()[0, 1]) < 0.2
    assert {row["label"] for row in rows} == {"covid|nodule", "nodule|covid", "covid", "nodule",
                                              "No Finding"} & {row["label"] for row in rows}
    with pytest.raises(InputError, match="allowed: shares from 0 to 1 of pneumonia, covid"):
        phantom.write(tmp_path / "q", n=4, findings={"edema": 0.5})


def test_contexts_are_written_for_each_finding_and_for_none():
    c = old_model().conditioner
    contexts, cells = finished_contexts(c, [{"label": "covid", "seen": "edema|mass"}])
    assert list(contexts) == ["null", "label=covid", "label=normal", "seen=edema", "seen=effusion",
                              "seen=mass", "seen=none", "row_000000"]
    assert cells["seen=none"] == {"seen": "none"}
    assert torch.equal(contexts["seen=none"], c({**c.null(1), "seen": torch.tensor([0])})[0])


def test_agreement_tells_of_all_at_once_and_of_each():
    cells = torch.tensor([1, 5, -1, 0, 4, 0, 1])                    # effusion is never there
    p = torch.tensor([[.9, .1, .2], [.8, .1, .4], [.9, .9, .9], [.1, .2, .3], [.2, .1, .9],
                      [.6, .1, .1], [.4, .3, .2]])

    class Judge:
        variables = [SEEN]

        def predict(self, images):
            return {"seen": p}

    (row,) = judge_agreement(Judge(), torch.zeros(7), {"seen": cells}, "real")
    assert (row["kind"], row["n"], row["accuracy"]) == ("findings", 6,
                                                        0.5) and row["low"] < 0.5 < row["high"]
    edema, mass = row["by_value"]
    assert (edema["value"], edema["n"], edema["accuracy"]) == ("edema", 3, pytest.approx(2 / 3))
    assert (mass["value"], mass["n"], mass["accuracy"]) == ("mass", 2, 0.5)
    known = [0, 1, 3, 4, 5, 6]
    assert edema["auroc"] == auroc(p[known, 0].double().numpy(),
                                   np.array([1, 1, 0, 0, 0, 1], bool)) == pytest.approx(8 / 9)
    assert edema["auroc_low"] < edema["auroc"] < edema["auroc_high"] and mass["auroc"] == 1
    (always,) = judge_agreement(Judge(), torch.zeros(7), {"seen": torch.full((7,), 2)}, "real")
    assert [v["value"] for v in always["by_value"]] == ["effusion"] and math.isnan(
        always["by_value"][0]["auroc"])


def test_a_report_breaks_down_by_each_of_the_commonest():
    def table(*cells):
        return Table([{"label": "a", "seen": cell, "file": str(k)} for k, cell in enumerate(cells)])

    found, _ = by_condition.groups({
        "train": table(*CELLS), "heldout": table("mass", "nodule|edema"),
        "synthetic": table("edema", "", "none")})
    # by their number in training
    assert list(found) == ["seen: edema", "seen: effusion", "seen: mass", "seen: nodule"]
    assert found["seen: edema"]["train"].tolist() == ["yes", "yes", "", "no", "no", "no", "yes",
                                                      "yes"]
    assert found["seen: nodule"]["heldout"].tolist() == ["no", "yes"]
    assert found["seen: mass"]["synthetic"].tolist() == ["no", "", "no"]


def test_an_audit_reads_them_as_one_feature_each():
    x = baselines._column("seen", ROWS)
    assert x.shape == (8, 4) and x[1].tolist() == [1, 0, 1, 0] and x[2].tolist() == [0, 0, 0, 1]


def test_real_findings(cxr):
    table = read_table(cxr)
    v = var.infer("findings", table.column("findings"))
    cells = var.encode([v], table.rows)["findings"]
    assert isinstance(v, Findings) and len(v.values) == 14 and "No Finding" not in v.values
    assert (cells == 0).sum() == sum(cell == "No Finding" for cell in table.column("findings"))
    for value, n in zip(v.values, v.bits(cells).sum(0).tolist()):
        assert n == sum(value in cell.split("|") for cell in table.column("findings")) > 0


@pytest.mark.slow
def test_the_whole_chain_on_a_table_as_nihs(tmp_path, capsys):
    """No flag names a finding: train, sample, classify, report and audit, each by finding."""
    names = [f"{p:08d}_{k:03d}.png" for p in range(1, 61) for k in range(2)]
    cells = ["No Finding", "Effusion", "Edema|Effusion", "Edema", "Edema|Nodule"]
    labels = [cells[k // 2 % 5] for k in range(120)]
    for k, name in enumerate(names):
        images.write(tmp_path / "nih/images_001/images" / name, phantom.phantom(0, k, 32).image)
    sets.table(tmp_path / "nih/Data_Entry_2017.csv", sets.NIH, [
        {"Image Index": name, "Finding Labels": label, "Patient ID": name[:8],
         "Patient Age": 30 + k % 40, "Patient Gender": "MF"[k // 2 % 2], "View Position": "PA"}
        for k, (name, label) in enumerate(zip(names, labels))])
    (tmp_path / "nih/train_val_list.txt").write_text("\n".join(names[:80]))
    (tmp_path / "nih/test_list.txt").write_text("\n".join(names[80:]))
    found = {"Edema", "Effusion", "Nodule"}
    root, once = str(tmp_path / "x"), {"steps": 2, "save_every": 2}
    train.train_vae(train.VAEConfig(root=root, data=(str(tmp_path / "nih"),), size=32, **once))
    train.train_diffusion(train.DiffusionConfig(root=root, snapshots=0, balance=1.0, **once))
    assert "label Edema, Effusion, Nodule" in capsys.readouterr().out
    sample.sample(sample.SampleConfig(root=root, per_label=40, steps=1, scales=("Nodule=3",)))
    made = read_table(tmp_path / "x/samples", split=False)
    assert Counter(made.column("label")) == dict.fromkeys(cells, 24)
    with pytest.raises(InputError, match="guidance of 'Nodul': .*nearest: Nodule"):
        sample.sample(sample.SampleConfig(root=root, scales=("Nodul=3",), out=f"{root}/other"))
    classify.run_study(classify.Config(root=root, steps=2, seeds=1, size=32, width=8))
    summary = runs.read_json(tmp_path / "x/classifier/summary.json")
    assert summary["labels"] == ["Edema", "Effusion", "Nodule"] and not summary["exclusive"]
    n = {row["arm"]: row["n_train"] for row in summary["arms"]}
    assert n["real+1xsynthetic"] == n["real+1xduplicates"] == 2 * n["real"]
    evaluate.run_report(evaluate.Config(root=root, repeats=10, audit=0, extractors=("pixels",)))
    report = runs.read_json(tmp_path / "x/report/report.json")
    assert {"label: Edema", "label: Effusion"} <= {row["condition"] for row in report["conditions"]}
    read = next(row for row in report["agreement"] if row["variable"] == "label")
    assert {v["value"] for v in read["by_value"]} == found
    text = (tmp_path / "x/report/report.html").read_text()
    assert "Seen where it was asked for" in text
    evaluate.run_audit(evaluate.AuditConfig(root=root))
    audit = runs.read_json(tmp_path / "x/audit/audit.json")
    # a label of too few patients, for phantoms of 32 px look alike, is left out
    assert {"Nodule"} <= {b["label"] for b in audit["baselines"]} <= {*found, "none"}


def test_a_combination_is_drawn_whatever_its_spelling():
    label = var.Findings("label", ("A", "B"))
    known = [{"label": cell, "sex": sex} for cell, sex in (("A|B", "F"), *[("B|A", "M")] * 9)]
    rows = plan.plan([label, var.Category("sex", ("F", "M"))], known, labels=["A|B"], per_label=10)
    assert Counter(row["sex"] for row in rows) == {"F": 1, "M": 9}
    with pytest.raises(InputError, match="named twice"):
        plan.plan([label], [{"label": "A"}], labels=["A|B", "B|A"], per_label=1)
    like = [{"label": "A|C"}, {"label": "B"}]  # C is not the model's
    rows = plan.plan([label], known, like=like, per_label=2)
    assert {row["label"] for row in rows} == {"B"}
