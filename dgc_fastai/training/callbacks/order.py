"""The order of the callbacks: at every event, fastai calls them from the lowest order to the highest.

fastai's own, which these are placed between (version 2.8):

| order | callback |
|---|---|
| 0 | MixUp, CutMix |
| 6 | GradientAccumulation: divides the loss |
| 9 | CastToTensor |
| 10 | MixedPrecision: leaves autocast, then scales the loss |
| 11 | GradientClip, DistributedTrainer: wraps the network |
| 50 | Recorder: fixes the columns in `before_fit`, collects losses and metrics |
| 51 | TensorBoardCallback, WandbCallback |
| 60 | ParamScheduler, ProgressCallback |
"""

DISTILLATION = 4
"""Takes the teacher's answers to images that are mixed, within autocast; the gate penalty keeps its own weight."""

ANNEAL_GATES = 5
"""Adds the gate penalty before GradientAccumulation divides the loss and MixedPrecision scales it."""

REDUCE_OVER_PROCESSES = 5.5
"""Weights the whole loss, with the penalty, and averages the penalty; before GradientAccumulation skips a step."""

AVERAGE_WEIGHTS = 20
"""Copies and averages weights after MixedPrecision has skipped a step that overflowed, and validates the average
unwrapped: DistributedTrainer has put the wrapper on."""

NON_FINITE_LOSS = 51
"""Looks at the loss after MixedPrecision has left autocast; Recorder has waited for the device by then, anyway."""

DIAGNOSIS = 65
"""Looks at the epoch after Recorder has collected its metrics, before the run recorder writes what is wrong."""

RUN_RECORDER = 70
"""Writes the epoch's row and weights after Recorder has collected its metrics."""

SHOW_ROW = 75
"""The terminal and the loggers that show the row which the run recorder has made."""

SAVE_STATE = 80
"""Last: whatever the state says is done has been written, and every callback is ready to load its state."""
