"""Public data sets as they come, tiny: their folders, file names and columns, with other pixels."""

from collections.abc import Sequence
from pathlib import Path

from data_sets import picture

NIH = ("Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
       "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],")
CHEXPERT = ("Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,"
            "Lung Opacity,Lung Lesion,Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,"
            "Pleural Effusion,Pleural Other,Fracture,Support Devices")
IEEE = ("patientid,offset,sex,age,finding,RT_PCR_positive,survival,view,modality,date,location,"
        "folder,filename,doi,url,license,clinical_notes,other_notes")
PADCHEST = (",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,"
            "ViewPosition_DICOM,Projection,MethodProjection,Pediatric,ReportID,Report,MethodLabel,"
            "Labels")


def pictures(folder: Path, names: Sequence[str], start: int = 0) -> None:
    for k, name in enumerate(names, start):
        picture(folder / name, k)


def table(path: Path, header: str, rows: Sequence[dict]) -> None:
    """A CSV whose rows name some of its columns; the others are empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [",".join(str(row.get(name, "")) for name in header.split(",")) for row in rows]
    path.write_text("\n".join([header, *lines]) + "\n")


def nih(folder: Path) -> Path:
    """Twelve patients of two images each, in two archives; the official test has the last four."""
    names = [f"{p:08d}_{k:03d}.png" for p in range(1, 13) for k in range(2)]
    pictures(folder, [f"images_{1 + k // 12:03d}/images/{name}" for k, name in enumerate(names)])
    table(folder / "Data_Entry_2017.csv", NIH, [
        {"Image Index": name, "Finding Labels": ["No Finding", "Cardiomegaly|Effusion"][k // 2 % 2],
         "Patient ID": 1 + k // 2, "Patient Age": "58", "Patient Gender": "MF"[k // 2 % 2],
         "View Position": "PA"} for k, name in enumerate(names)])
    table(folder / "BBox_List_2017.csv", "Image Index,Finding Label,Bbox [x,y,w,h]",
          [{"Image Index": names[0], "Finding Label": "Mass"}])
    (folder / "train_val_list.txt").write_text("\n".join(names[:-8]) + "\n")
    (folder / "test_list.txt").write_text("\n".join(names[-8:]))
    return folder


def chexpert(folder: Path) -> Path:
    """Nine patients, a frontal and a lateral view each; three of them in valid/."""
    for split, patients in (("train", range(1, 7)), ("valid", range(64541, 64544))):
        names = [f"{split}/patient{p:05d}/study1/view{v}_{side}.jpg" for p in patients
                 for v, side in ((1, "frontal"), (2, "lateral"))]
        pictures(folder, [name.replace(".jpg", ".png") for name in names], patients[0] % 1000)
        for name in names:
            (folder / name.replace(".jpg", ".png")).rename(folder / name)
        cells = ["1.0", "0.0", "-1.0", "", "1.0", "0.0"]
        table(folder / f"{split}.csv", CHEXPERT, [
            {"Path": f"CheXpert-v1.0-small/{name}", "Sex": "Female", "Age": 68, "AP/PA": "AP",
             "Frontal/Lateral": "Frontal", "Pneumonia": cells[k // 2], "Edema": cells[k // 2 - 1],
             "No Finding": ""} for k, name in enumerate(names)])
    return folder


def mimic(folder: Path) -> Path:
    """files/p10/p10000032/s50414267/….jpg, and compressed tables that name no files."""
    pictures(folder, [f"files/p10/p1000003{k}/s5041426{k}/02aa804e-bde0afdd-112c0b34-{k}.png"
                      for k in range(6)])
    (folder / "mimic-cxr-2.0.0-chexpert.csv.gz").write_bytes(b"\x1f\x8b")
    return folder


def bimcv(folder: Path) -> Path:
    pictures(folder, [f"sub-S0304{k}/ses-E0798{k}/mod-rx/sub-S0304{k}_ses-E0798{k}_run-1_"
                      "bp-chest_vp-ap_dx.png" for k in range(6)])
    (folder / "participants.tsv").write_text("participant\tmodality_dicom\tage\tgender\n"
                                             "sub-S03040\t['DX']\t[61]\tM\n")
    return folder


def padchest(folder: Path) -> Path:
    names = [f"21684011136696401382954316651201333813574588{k}_02-094-102.png" for k in range(6)]
    pictures(folder, [f"{k // 3}/{name}" for k, name in enumerate(names)])
    table(folder / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv", PADCHEST, [
        {"": k, "ImageID": name, "ImageDir": k // 3, "PatientID": f"83{k // 2}",
         "PatientSex_DICOM": "F", "Projection": "PA",
         "Labels": ["['normal']", "\"['edema', 'mass ', '', 'mass']\""][k % 2]}
        for k, name in enumerate(names)])
    return folder


def ieee8023(folder: Path) -> Path:
    names = [f"auntminnie-{k}-2020_01_28.png" for k in range(6)]
    pictures(folder / "images", names)
    pictures(folder / "annotations", ["lungs.png"], 50)
    table(folder / "metadata.csv", IEEE, [
        {"patientid": k // 2, "offset": 3, "sex": "M", "age": 65, "view": "PA", "folder": "images",
         "finding": "Pneumonia/Viral/COVID-19" if k < 3 else "No Finding", "filename": name}
        for k, name in enumerate(names)])
    return folder


def radiography(folder: Path) -> Path:
    """COVID-19 Radiography Database."""
    for c, label in enumerate(("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia")):
        for k in range(3):
            for kind in ("images", "masks"):
                picture(folder / label / kind / f"{label}-{k}.png", 100 * c + 10 * k
                        + (kind == "masks"))
        (folder / f"{label}.metadata.xlsx").write_bytes(b"PK")
    (folder / "README.md.txt").write_text("cite")
    return folder


def kaggle(folder: Path) -> Path:
    """chest-xray-pneumonia as it is unpacked: doubled, and with the rubbish of a Mac."""
    for top in ("chest_xray", "chest_xray/chest_xray", "chest_xray/__MACOSX/chest_xray"):
        for s, split in enumerate(("train", "val", "test")):
            for c, label in enumerate(("NORMAL", "PNEUMONIA")):
                picture(folder / top / split / label / f"IM-{s}{c}-0001.png", 10 * s + c)
    (folder / "chest_xray/train/NORMAL/.DS_Store").write_bytes(b"")
    return folder / "chest_xray"
