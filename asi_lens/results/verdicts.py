"""One function per claim of the paper: takes a notebook's table, returns a verdict.

A table is a DataFrame with the rows of the notebook's CSV. A claim's function returns None if the table lacks
rows that the claim compares, for example a method that was not trained. The function raises DataError, naming
the column, if the table lacks a column that the rule needs. If a number that the rule compares was not
measured (NaN), the verdict's `holds` is None. The paper is arXiv 2508.16929.
"""

from __future__ import annotations

from asi_lens.results.architecture_verdicts import architectures, c1_on_each, c4_on_each, c5_on_each
from asi_lens.results.beyond_verdicts import (
    centering_or_subspace,
    do_saved_features_mean_something,
    when_features_die,
)
from asi_lens.results.dictionary_verdicts import (
    RANKS,
    c6,
    c6_released,
    c7,
    c7_by_size,
    c8,
    c9,
    c10,
    c11,
    c12,
    good_d_init,
    rank_points,
)
from asi_lens.results.dose_verdicts import (
    are_the_right_features_lost,
    dose_and_response,
    dose_points,
    falling_curve,
)
from asi_lens.results.encoder_step_verdicts import what_in_a_step_kills
from asi_lens.results.judging import (
    Number,
    Verdict,
    combined,
    final_numbers,
    in_every_seed,
    loss_is_higher,
    rank_correlation,
)
from asi_lens.results.last_step_verdicts import death_by_rate, last_steps
from asi_lens.results.paired_verdicts import c7_spliced
from asi_lens.results.rank_verdicts import (
    c1,
    c2,
    c3,
    c4,
    c5,
    directions_needed,
    drop_taken_back,
    projection_ranks,
)
from asi_lens.results.stability_verdicts import subspace_stability
from asi_lens.results.start_verdicts import starts_against_asi, what_a_start_must_have
from asi_lens.results.trained_rank_verdicts import rank_and_loss
