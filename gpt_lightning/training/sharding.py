"""Says how tensor-parallel peers share the GPT of a GPTLightningModule, by the names of its submodules."""

from gpt_lightning.model.config import GPTConfig
from gpt_lightning.parallel.plan import ParallelStyle


def tensor_parallel_plan(config: GPTConfig) -> dict[str, ParallelStyle]:
    """Cuts attention by heads, the MLP by hidden features, token table and head by the vocabulary."""
    heads, d_ff = "model.config.n_heads", "model.config.d_ff"
    vocabulary = "model.config.vocab_size"
    plan = {
        "model.token_embedding": ParallelStyle("vocab_embedding", option=vocabulary),
        "model.position_embedding": ParallelStyle("sequence"),
        "model.blocks.*.ln_[12]": ParallelStyle("sequence"),
        "model.blocks.*.attn.qkv_proj": ParallelStyle("column", config.n_heads, heads),
        "model.blocks.*.attn.out_proj": ParallelStyle("row", config.n_heads, heads),
        "model.blocks.*.mlp.up_proj": ParallelStyle("column", option=d_ff),
        "model.blocks.*.mlp.down_proj": ParallelStyle("row", option=d_ff),
        "model.ln_f": ParallelStyle("sequence"),
        "model.lm_head": ParallelStyle("vocab_head", option=vocabulary),
    }
    if config.dropout > 0:
        plan["model.blocks.*.attn"] = ParallelStyle("sharded_dropout")
        plan["model.blocks.*.dropout"] = plan["model.dropout"] = ParallelStyle("sequence")
    return plan
