"""What a command says of its data at the start."""

from minidiff.data import phantom
from minidiff.data.dataset import by_split, glance
from minidiff.data.table import Table, read_table


def test_sets_by_label_patients_colour_and_notes(tmp_path):
    table = read_table(phantom.write(tmp_path / "p", n=90, size=32))
    text = glance(["p"], by_split(table), grey=True)
    lines = text.splitlines()
    assert lines[0] == "data: p" and lines[1].split() == ["covid", "normal", "pneumonia", "images",
                                                          "patients"]
    train = table.select(split="train")
    first, *_, n, patients = lines[2].split()
    assert (first, int(n), int(patients)) == ("train", len(train),
                                              len(set(train.column("patient"))))
    assert "patients known; grey" in text and text.count("\n") == 5


def test_many_labels_and_assumed_patients():
    rows = [{"label": f"l{k % 12}", "split": "train", "patient": str(k)} for k in range(24)]
    text = glance(["a", "b"], {"train": Table(rows, True, ["a: something to know"])})
    assert "others" in text and "patients assumed" in text and text.endswith(
        "  a: something to know")
