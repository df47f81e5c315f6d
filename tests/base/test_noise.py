"""Random numbers that follow from a key, against the published generator and their distribution."""

import numpy as np

from capa_export.base.noise import gumbel, philox

EULER = 0.5772156649


def test_it_begins_as_random123_says() -> None:
    """Its other known answers have counters that are not zero here; kernels are held against Triton's own generator."""
    assert philox(0, np.array([0]), 0).tolist() == [0x6627E8D5]


def test_noise_is_gumbel_s_and_every_draw_another() -> None:
    tokens = np.arange(100_000)
    noise = gumbel(7, tokens, 3)
    assert np.isfinite(noise).all()
    # Mean and standard deviation, to four standard errors.
    assert abs(noise.mean() - EULER) < 4 * noise.std() / len(noise) ** 0.5
    assert abs(noise.std() - np.pi / 6**0.5) < 0.02
    for other in (gumbel(8, tokens, 3), gumbel(7, tokens, 4), gumbel(7 + (1 << 32), tokens, 3)):
        assert abs(np.corrcoef(noise, other)[0, 1]) < 0.02
    assert np.array_equal(noise[500:600], gumbel(7, tokens[500:600], 3))
