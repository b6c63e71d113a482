"""Runs the model of model_worker.py by llama.cpp, with the same codes as Q4_0, for whole_model.py.

    ENVIRONMENT/bin/python llama_cpp_model.py FOLDER THREADS        FOLDER: of `model_worker.py codes`

It speaks the protocol of model_worker.py. Q4_0 has groups of 32 with a scale in float16: the scale of a larger group is
repeated, which changes no weight. The embeddings and the output head, which are dense in all candidates, are float16.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp as api
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

GROUP = 32  # of Q4_0
PROMPT = 16
MARGIN = 64  # tokens that a sequence may have beyond its prompt
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj -> blk.3.ffn_up.weight"""
    if name.startswith("model.layers."):
        number, _, leaf = name.removeprefix("model.layers.").partition(".")
        return f"blk.{number}.{NAMES[leaf]}.weight"
    return f"{NAMES[name]}.weight"


def rows_for_rotation(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring rows of a head of q and k, transformers those of its two halves."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def q4_0(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """codes (out, in) uint8, scale (out, groups) -> blocks (out, in / 32 * 18) uint8

    raises  ValueError if a scale is no float16
    """
    out, columns = codes.shape
    small = scale.astype(np.float16)
    if not (small.astype(np.float32) == scale).all():
        raise ValueError("a scale is no number of float16")
    blocks = codes.reshape(out, columns // GROUP, 2, GROUP // 2)
    nibbles = blocks[:, :, 0] | blocks[:, :, 1] << 4
    repeated = np.repeat(small, columns // GROUP // scale.shape[1], 1)[:, :, None].view(np.uint8)
    return np.concatenate([repeated, nibbles], 2).reshape(out, -1)


def write_model(folder: Path, target: Path) -> None:
    config, tensors = json.loads((folder / "config.json").read_text()), np.load(folder / "tensors.npz")
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    width = config["hidden_size"] // config["num_attention_heads"]
    writer = GGUFWriter(str(target), "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_tokenizer_model("no_vocab")
    for key in tensors.files:
        name, _, kind = key.rpartition(".")
        if kind == "codes":
            codes, scale = tensors[key], tensors[f"{name}.scale"]
            if count := heads.get(name.rpartition(".")[2]):
                codes, scale = rows_for_rotation(codes, count), rows_for_rotation(scale, count)
            writer.add_tensor(gguf_name(name), q4_0(codes, scale), raw_dtype=GGMLQuantizationType.Q4_0)
        elif kind == "weight":
            is_matrix = tensors[key].ndim == 2
            writer.add_tensor(gguf_name(name), tensors[key].astype(np.float16 if is_matrix else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Sequences:
    """Some sequences of the same length, which a context decodes together."""

    def __init__(self, context: Any, count: int, vocabulary: int) -> None:
        self.context, self.count, self.vocabulary, self.length = context, count, vocabulary, 0

    def forward(self, tokens: np.ndarray) -> np.ndarray:
        """tokens (sequences, some) -> logits (sequences, vocabulary) of the last ones"""
        sequences, some = tokens.shape
        batch = api.llama_batch_init(tokens.size, 0, 1)
        try:
            batch.n_tokens = tokens.size
            for place in range(tokens.size):
                sequence, at = divmod(place, some)
                batch.token[place] = int(tokens[sequence, at])
                batch.pos[place] = self.length + at
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = sequence
                batch.logits[place] = at == some - 1
            if error := api.llama_decode(self.context, batch):
                raise RuntimeError(f"llama_decode: {error}")
        finally:
            api.llama_batch_free(batch)
        self.length += some
        of = [api.llama_get_logits_ith(self.context, (row + 1) * some - 1) for row in range(sequences)]
        return np.stack([np.ctypeslib.as_array(logits, (self.vocabulary,)).copy() for logits in of])

    def restart(self) -> None:
        api.llama_memory_clear(api.llama_get_memory(self.context), False)
        self.length = 0


@contextmanager
def sequences_of(model: Any, count: int, length: int, threads: int) -> Iterator[Sequences]:
    settings = api.llama_context_default_params()
    settings.n_ctx, settings.n_seq_max = count * length, count
    settings.n_batch = settings.n_ubatch = 512
    settings.n_threads = settings.n_threads_batch = threads
    context = api.llama_init_from_model(model, settings)
    if not context:
        raise RuntimeError("llama.cpp made no context")
    try:
        yield Sequences(context, count, api.llama_vocab_n_tokens(api.llama_model_get_vocab(model)))
    finally:
        api.llama_free(context)


def prompt_of(sequences: int, tokens: int, vocabulary: int) -> np.ndarray:
    return np.random.default_rng(1).integers(1, vocabulary, (sequences, tokens))


def task(given: Sequences, name: str, amount: int) -> Callable[[], object]:
    """A function that does the task once; it is warm."""
    if name == "decode":
        logits = given.forward(prompt_of(amount, PROMPT, given.vocabulary))

        def step() -> None:
            nonlocal logits
            logits = given.forward(logits.argmax(1)[:, None])

        step()
        return step

    def fresh(prompt: np.ndarray, steps: int) -> None:
        given.restart()
        logits = given.forward(prompt)
        for _ in range(steps):
            logits = given.forward(logits.argmax(1)[:, None])

    if name == "prefill":
        return lambda: fresh(prompt_of(1, amount, given.vocabulary), 0)
    if name == "generate":  # the prompt gives the first token
        return lambda: fresh(prompt_of(1, PROMPT, given.vocabulary), amount - 1)
    raise ValueError(f"{name!r} is no task")


def answer(model: Any, threads: int, line: str) -> list[object]:
    name, *numbers = line.split()
    if name == "logits":
        tokens = np.array([[*map(int, numbers)]])
        with sequences_of(model, 1, tokens.size + MARGIN, threads) as given:
            return given.forward(tokens)[0].tolist()
    amount, repeats, longest = map(float, numbers)
    count, length = (int(amount), PROMPT) if name == "decode" else (1, int(amount) + PROMPT)
    with sequences_of(model, count, length + MARGIN, threads) as given:
        run, spent = task(given, name, int(amount)), list[float]()
        worked = time.process_time()
        while not spent or (len(spent) < repeats and sum(spent) < longest):
            start = time.perf_counter()
            run()
            spent.append(time.perf_counter() - start)
        return [spent, (time.process_time() - worked) / len(spent)]


@api.llama_log_callback
def ignore(level: int, text: bytes, data: object) -> None:
    """llama.cpp's messages; what fails is seen by its result."""


def main() -> None:
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    target = folder / "model.gguf"
    write_model(folder, target)
    api.llama_log_set(ignore, None)
    api.llama_backend_init()
    model = api.llama_model_load_from_file(str(target).encode(), api.llama_model_default_params())
    if not model:
        sys.exit("llama.cpp could not load the model")
    print(threads, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(model, threads, line)), flush=True)


if __name__ == "__main__":
    main()
