"""Moments: equal to numpy's on all rows, whatever the batches; merging; FD from them; memory."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minidiff.errors import InputError
from minidiff.evaluation.metrics import moments
from minidiff.evaluation.metrics.distances import fid
from minidiff.evaluation.metrics.moments import Moments, fid_of, root_trace


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def streamed(x, *sizes):
    total = Moments(x.shape[1])
    for part in np.split(x, np.cumsum(sizes)):
        total.add(part)
    return total


@pytest.mark.parametrize("sizes", [(), (1,), (1, 1, 30), (0, 50), (17, 17, 17)])
def test_moments_equal_numpy_whatever_the_batches(sizes, monkeypatch):
    monkeypatch.setattr(moments, "ROWS", 23)
    x = normal(0, 90, 6) * np.arange(1, 7) + 5
    got = streamed(x, *sizes)
    assert got.count == 90
    np.testing.assert_allclose(got.mean, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(got.covariance, np.cov(x, rowvar=False), rtol=1e-11, atol=1e-12)


def test_a_large_mean_costs_no_digits():
    """E[x²] − E[x]² would leave nothing of a spread of 1 beside a mean of 10⁸."""
    x = normal(0, 4000, 3)
    got = streamed(x + 1e8, 1000, 1000, 7)
    np.testing.assert_allclose(got.covariance, np.cov(x, rowvar=False), rtol=1e-6, atol=1e-7)


def test_float32_batches_are_summed_in_float64():
    x = (normal(0, 3000, 4) + 100).astype(np.float32)
    np.testing.assert_allclose(Moments(4).add(x).covariance, np.cov(x.astype(float), rowvar=False),
                               rtol=1e-10, atol=1e-12)


# above, at and below full rank
@pytest.mark.parametrize("n,d", [(200, 24), (24, 24), (10, 24), (2, 5)])
def test_fd_of_moments_equals_fd_of_all_rows(n, d):
    x, y = normal(0, n, d), 1.3 * normal(1, n + 5, d) + 0.2
    tolerance = 1e-9 if n > d else 1e-6   # the square root of a rounding, where an eigenvalue is 0
    assert fid_of(streamed(x, 7), streamed(y, 3)) == pytest.approx(fid(real=x, fake=y),
                                                                   rel=tolerance)


def test_fd_of_moments_of_degenerate_sets():
    x = normal(0, 50, 6)
    a, flat = Moments(6).add(x), Moments(6).add(np.ones((9, 6)))
    assert fid_of(a, a) == pytest.approx(0, abs=1e-12)
    assert fid_of(flat, flat) == 0
    # constant features: the shift alone
    assert fid_of(flat, Moments(6).add(np.full((4, 6), 3.0))) == pytest.approx(24)
    assert fid_of(a, flat) == pytest.approx(((x.mean(0) - 1) ** 2).sum() + x.var(0, ddof=1).sum())


def test_root_trace_of_singular_matrices():
    """By turns the first, the second and both are singular; diagonal ones have Σ √(s·t) by hand."""
    s, t = np.array([4.0, 9, 0, 1]), np.array([1.0, 4, 25, 16])
    for a, b in ((s, t), (t, s), (s, np.array([1.0, 0, 4, 9])), (t, t)):
        turn = np.linalg.qr(normal(0, 4, 4))[0]
        got = root_trace(turn @ np.diag(a) @ turn.T, turn @ np.diag(b) @ turn.T)
        assert got == pytest.approx(np.sqrt(a * b).sum(), rel=1e-7)


def test_bad_input_is_named_and_leaves_the_moments_as_they_were():
    a = Moments(3)
    with pytest.raises(InputError, match="at least 2 images; there are 0"):
        a.covariance  # noqa: B018
    with pytest.raises(InputError, match="at least 2 images; there are 1"):
        fid_of(a.add(np.ones((1, 3))), a)
    with pytest.raises(InputError, match="2 of 5 feature vectors"):
        a.add(np.where(np.arange(5)[:, None] < 2, np.inf, 1.0) * np.ones((5, 3)))
    assert a.count == 1


@pytest.mark.slow
def test_20_000_images_are_never_held():
    """n = 20,000 a side, d = 2,048: equal to `fid` of all rows, in less memory than those of one
    side.
    """
    code = """if True:
        import resource, sys
        import numpy as np
        from minidiff.evaluation.metrics.moments import Moments, fid_of
        def batch(side, i):
            rng = np.random.default_rng((side, i))
            x = rng.standard_normal((500, 2048), dtype=np.float32)
            return x * (1 + side * .1) + side * .05
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        if sys.argv[1] == "stream":
            a, b = Moments(2048).add(batch(0, 0)), Moments(2048)
            begin = peak()
            for i in range(1, 40):
                a.add(batch(0, i))
            for i in range(40):
                b.add(batch(1, i))
            adding = peak()
            print(fid_of(a, b).hex(), begin, adding - begin, peak() - begin)
        else:
            from minidiff.evaluation.metrics.distances import fid
            x, y = (np.concatenate([batch(side, i) for i in range(40)]) for side in (0, 1))
            print(fid(real=x, fake=y).hex())
    """
    run = lambda how: subprocess.run(  # noqa: E731
        [sys.executable, "-c", code, how], capture_output=True, text=True,
                                     check=True, cwd=Path(__file__).parents[1]).stdout.split()
    value, _, adding, whole = run("stream")
    matrix = 2048 * 2048 * 8
    assert int(adding) < 3 * matrix, "while adding: the second scatter, a product and a batch"
    assert int(whole) < 8 * matrix < 20_000 * 2048 * 8
    assert float.fromhex(value) == pytest.approx(float.fromhex(run("rows")[0]), rel=1e-9)
