"""Says how tensor-parallel peers share the GPT of a GPTLightningModule, by the names of its submodules."""

from gpt_lightning.model.config import GPTConfig
from gpt_lightning.parallel.plan import ParallelStyle


def tensor_parallel_plan(config: GPTConfig) -> dict[str, ParallelStyle]:
    """Cuts attention by heads, the MLP by hidden features, token table and head by the vocabulary."""
    vocabulary, d_ff = "model.config.vocab_size", "model.config.d_ff"
    heads = "model.config.n_heads" if config.n_kv_heads is None else "model.config.n_kv_heads"
    plan = {
        "model.token_embedding": ParallelStyle("vocab_embedding", option=vocabulary),
        "model.blocks.*.ln_[12]": ParallelStyle("sequence"),
        "model.blocks.*.attn.qkv_proj": ParallelStyle("column", config.kv_heads, heads),
        "model.blocks.*.attn.out_proj": ParallelStyle("row", config.kv_heads, heads),
        "model.blocks.*.mlp.up_proj": ParallelStyle("column", option=d_ff),
        "model.blocks.*.mlp.down_proj": ParallelStyle("row", option=d_ff),
        "model.ln_f": ParallelStyle("sequence"),
        "model.lm_head": ParallelStyle("vocab_head", option=vocabulary),
    }
    if config.positions == "learned":
        plan["model.position_embedding"] = ParallelStyle("sequence")
    if config.activation == "swiglu":
        plan["model.blocks.*.mlp.gate_proj"] = ParallelStyle("column", option=d_ff)
    if config.qk_norm:
        plan["model.blocks.*.attn.[qk]_norm"] = ParallelStyle("shared")
    if config.dropout > 0:
        plan["model.blocks.*.attn"] = ParallelStyle("sharded_dropout")
        plan["model.blocks.*.dropout"] = plan["model.dropout"] = ParallelStyle("sequence")
    return plan
