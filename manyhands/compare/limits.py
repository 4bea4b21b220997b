"""Every threshold of a verdict, once. docs/verdicts.md explains them; a test holds the page to this file.

E experts, K per token, V vocabulary.
"""

from typing import Final

MIN_STEPS: Final = 50
"""Steps below which nothing is said of what was learnt or of balance: too short to judge."""
MIN_STEPS_RATE: Final = 100
"""Steps below which nothing is said of the learning rate."""

OVERFIT: Final = 0.02
"""The last validation loss above the best, as a share of the best: a fault."""
OVERFIT_REMARK: Final = 0.005
"""The same: a remark."""
GAP: Final = 0.3
"""Where validation was not looked at on the way: validation loss above the training loss, as a share of it: a fault."""
GAP_EPOCHS: Final = 4.0
"""Epochs below which that gap is no sign of learning by heart."""

DIVERGED: Final = 0.05
"""The training loss at the end above its lowest, as a share of that: a fault."""
ROSE: Final = 0.10
"""The training loss above what it had been before, as a share of that, and come down again: the rate was too high."""
LEAST_RISE: Final = 0.05
"""A rise below this is none, in the loss's unit (nats): near 0 a share says nothing."""
ERRORS: Final = 4.0
"""A rise within so many standard errors of both means is noise."""

LITTLE: Final = 0.05
"""Gain over a baseline below which a run has learnt too little: over the unigram's loss, as a share of it."""
LITTLE_UNIFORM: Final = 0.10
"""The same over ln V, where the unigram's loss is not known."""
MOVED: Final = 0.03
"""Gain over ln V from which on a loss that stands still has learnt something, and the rate is too high, not too low."""
STOOD: Final = 0.3
"""Share of the stretches not below the one before from which on the loss stands still."""
STILL_FALLING: Final = 0.01
"""Fall of the training loss from the last tenth of the steps but one to the last, as a share: more would help."""

COLLAPSED: Final = 0.9
"""How far the K busiest experts' share of all choices is from an even share (0) to all of them (1): a fault."""
UNEVEN: Final = 0.5
"""The same: a remark."""
DEAD: Final = 0.1
"""Share of a layer's experts that no token chose in the last 50 steps: a fault; below it a remark."""
DEAD_PAIRS: Final = 50.0
"""Choices an expert would have had by an even share, below which having none says nothing."""

ALIKE: Final = 0.05
"""Distance of what two experts say to one token (0: the same, about 1: unrelated) below which they are alike."""
INTERCHANGEABLE: Final = 0.25
"""Share of a layer's experts that say nothing, or what another says: a fault; below it a remark."""

WAITING: Final = 0.5
"""Share of the steps' time spent waiting for data: a remark."""
SKIPPED: Final = 0.02
"""Share of updates that were skipped as spikes: a remark."""
SKIPPED_FAULT: Final = 0.2
"""The same: a fault."""
