"""Says what one measurement of a model's speed runs. `evaluation.speed` measures, and `engine.stage_times` predicts."""

from __future__ import annotations

PREFILL_TOKENS, DECODE_TOKENS = 128, 32  # of the prompt, and generated after it
SPEED_TOKENS = PREFILL_TOKENS + DECODE_TOKENS
SPEED_RUNS, DECODE_RUNS = 5, 3  # of which the median counts
SPEED_BATCH = 32  # batch size of an encoder
# With the runs before the first one that counts: a prompt that finds out whether there is a cache, and warm-ups.
ALL_PREFILL_RUNS, ALL_DECODE_RUNS, ALL_BATCH_RUNS = SPEED_RUNS + 2, DECODE_RUNS + 1, SPEED_RUNS + 1
