"""matrix.html from the contents of matrix.json alone."""

from collections.abc import Mapping

from minidiff.evaluation.matrix import controls, gates
from minidiff.evaluation.pages import charts, render
from minidiff.evaluation.verdicts import KINDS


def matrix(result: Mapping) -> str:
    """The whole page."""
    return render("matrix.html", **result, maps=charts.matrix_maps(result), kinds=KINDS,
                  names=gates.VERDICTS, known=controls.CONTROLS, blur=controls.BLUR,
                  noise=controls.NOISE, left=controls.LEFT, limit=gates.LIMIT)
