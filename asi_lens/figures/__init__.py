"""Builders of figures (each takes a table and returns a plotly figure), and `save`; all are names here."""

from __future__ import annotations

from asi_lens.figures.architectures import (
    overlap_by_layer,
    starts_by_architecture,
    with_cross,
)
from asi_lens.figures.beyond import (
    death_at_start,
    inputs_and_starts,
    lives,
    saved_features,
)
from asi_lens.figures.collapse import (
    dimension_curves,
    downstream_loss,
    rank_curves,
    rank_heatmap,
    rank_vs_tokens,
    spectra,
)
from asi_lens.figures.dead_features import (
    d_init_sweep,
    dead_feature_curves,
    dictionary_size,
    layers_and_sites,
    learning_rates,
)
from asi_lens.figures.doses import dose_response, known_features
from asi_lens.figures.encoder_steps import encoder_steps
from asi_lens.figures.kinds import dictionaries, jumprelu_schedule
from asi_lens.figures.last_steps import last_steps
from asi_lens.figures.output_projection import head_overlap, wo_ablation
from asi_lens.figures.released import released_dictionaries
from asi_lens.figures.stability import off_its_text, seed_matches, subspace_overlaps
from asi_lens.figures.starts import starts_side_by_side
from asi_lens.figures.trained_rank import final_rank_and_loss, rank_over_training
from asi_lens.results.figure_files import SavedFigure, save
