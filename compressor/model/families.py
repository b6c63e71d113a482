"""Names in configs and modules that differ between families of models.

A model is understood by running it. These names are needed only where a config has to be read or rewritten: its values
are called differently in each family, and none of them is computed.
"""

from __future__ import annotations

# The width of the residual stream: pruning and slicing write the new one.
WIDTH_KEYS = ("hidden_size", "n_embd", "d_model")

# The number of blocks: pruning writes how many are left.
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers")

# The number of attention heads: configs without head_dim divide the width by it, which a new width would change.
HEAD_COUNT_KEYS = ("num_attention_heads", "n_head")

# The width of an MLP: a stock config can hold pruned neurons if one of these is the number of them.
FFN_WIDTH_KEYS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")

# The eps of the norms: the mean of a narrower stream is taken over fewer values, so a new width needs a new eps.
NORM_EPS_KEYS = (
    "rms_norm_eps",
    "layer_norm_eps",
    "layernorm_epsilon",
    "layer_norm_epsilon",
    "norm_eps",
    "norm_epsilon",
)

# The number of experts: time is predicted before the model runs, and a token passes only some of the experts.
EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")

# The number of blocks that predict further tokens (DeepSeek and GLM, transformers 5, Qwen, MiniMax): checkpoints have
# tensors for them that no class reads.
FURTHER_BLOCKS_KEYS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules")
