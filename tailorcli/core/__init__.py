"""The mathematics of Model Tailor as pure functions on tensors: no files, no logging, no globals.

Trailing comments give shapes: O output rows, I input columns, N calibration tokens. A layer computes
``y = W x`` with W of shape (O, I); ``delta = W_tuned - W_base``; a mask is True where an entry is taken
from the fine-tuned weights.
"""

from tailorcli.core.baselines import baseline_layer, drop_and_rescale, interpolate, random_mask, released_layer
from tailorcli.core.distillation import adam_step_, divergence, kept_accuracy
from tailorcli.core.hessian import (
    accumulate_,
    accumulate_diagonal_,
    combine_hessians,
    dampen,
    dead_channels,
    inverse_diagonal,
    inverse_factor,
    pack_triangle,
    unpack_triangle,
)
from tailorcli.core.propagation import accumulate_moments_, propagated_errors, refit, solve_propagated
from tailorcli.core.retain import prepare_retaining, retained_goal
from tailorcli.core.rivals import denoise, fapm_mask, fapm_score, hard_threshold, line_weight
from tailorcli.core.scores import count_kept, fuse, minmax, salience, select_mask, sensitivity
from tailorcli.core.solvers import Decoration, decorate_joint, decorate_sequential
from tailorcli.core.stitch import (
    overlap_figures,
    stitch_average,
    stitch_joint,
    stitch_patches,
    task_errors,
    union_mask,
)
from tailorcli.core.tailor import LayerResult, tailor_layer

__all__ = [
    "Decoration",
    "LayerResult",
    "accumulate_",
    "accumulate_diagonal_",
    "accumulate_moments_",
    "adam_step_",
    "baseline_layer",
    "combine_hessians",
    "count_kept",
    "dampen",
    "dead_channels",
    "decorate_joint",
    "decorate_sequential",
    "denoise",
    "divergence",
    "drop_and_rescale",
    "fapm_mask",
    "fapm_score",
    "fuse",
    "hard_threshold",
    "interpolate",
    "inverse_diagonal",
    "inverse_factor",
    "kept_accuracy",
    "line_weight",
    "minmax",
    "overlap_figures",
    "pack_triangle",
    "prepare_retaining",
    "propagated_errors",
    "random_mask",
    "refit",
    "released_layer",
    "retained_goal",
    "salience",
    "select_mask",
    "sensitivity",
    "solve_propagated",
    "stitch_average",
    "stitch_joint",
    "stitch_patches",
    "tailor_layer",
    "task_errors",
    "union_mask",
    "unpack_triangle",
]
