"""The custom classifier and the study that asks whether synthetic images helped.

    inputs ─▶ sets and samples that may be studied ─ arms ─▶ training images ─ study, predictor,
    resnet ─▶ logits a seed
    logits ─ assess: scores, compare, calibration, predictive_uncertainty, fairness ─▶
    summary.json

Before them shortcuts, after them predict.
"""
