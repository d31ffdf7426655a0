"""Says how tensor-parallel peers share a GPT, by the names of its submodules."""

from typing import Literal, NamedTuple

from gpt_lightning.model.config import GPTConfig


class Sharding(NamedTuple):
    """Says in which style peers share a submodule, what a cut leaves whole, and which option counts that."""

    style: Literal["column", "row", "vocab_embedding", "vocab_head", "sharded_dropout", "sequence"]
    units: int | None = None
    option: str | None = None


def tensor_parallel_plan(config: GPTConfig) -> dict[str, Sharding]:
    """Cuts attention by heads, the MLP by hidden features, token table and head by the vocabulary."""
    heads, d_ff = "model.config.n_heads", "model.config.d_ff"
    vocabulary = "model.config.vocab_size"
    plan = {
        "token_embedding": Sharding("vocab_embedding", option=vocabulary),
        "position_embedding": Sharding("sequence"),
        "blocks.*.ln_[12]": Sharding("sequence"),
        "blocks.*.attn.qkv_proj": Sharding("column", config.n_heads, heads),
        "blocks.*.attn.out_proj": Sharding("row", config.n_heads, heads),
        "blocks.*.mlp.up_proj": Sharding("column", option=d_ff),
        "blocks.*.mlp.down_proj": Sharding("row", option=d_ff),
        "ln_f": Sharding("sequence"),
        "lm_head": Sharding("vocab_head", option=vocabulary),
    }
    if config.dropout > 0:
        plan["blocks.*.attn"] = Sharding("sharded_dropout")
        plan["blocks.*.dropout"] = plan["dropout"] = Sharding("sequence")
    return plan
