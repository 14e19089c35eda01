"""States of encoder rows: bias, norm, angle to the mean."""

from __future__ import annotations

import torch
from small_trainings import make, quick, small_store

from asi_lens.sae.initialize import initialize
from asi_lens.sae.row_states import STATES, row_states
from asi_lens.sae.train import Trainer


def test_states_are_those_of_the_rows() -> None:
    store, sae = small_store(), make()
    initialize(sae, "random", store.spectrum, sample=store.sample(1000))
    trainer = Trainer(sae, quick())
    sae.b_enc.data[3] = -0.5
    sae.encoder_rows[3] = 2 * store.mean
    sae.encoder_rows[4] = -store.mean
    states = row_states(trainer)
    assert tuple(states) == STATES
    assert states["bias"][3] == -0.5
    torch.testing.assert_close(states["norm"][3], 2 * store.mean.norm(), check_dtype=False)
    torch.testing.assert_close(states["mean_cosine"][[3, 4]], torch.tensor([1.0, -1.0]))
    assert states["mean_cosine"].abs().max() < 1 + 1e-6
    # They are copies: a later step does not change them.
    trainer.step(next(iter(trainer.stream(store, 0))))
    assert states["bias"][3] == -0.5
