"""The same models in other implementations, and what this machine's memory gives."""

import time


def transformers_config(config, context: int, **settings):  # type: ignore[no-untyped-def]
    """The same sizes in transformers' words."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=config.dim,
        intermediate_size=config.hidden_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        vocab_size=config.vocab_size,
        max_position_embeddings=context,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        attn_implementation="sdpa",
        **settings,
    )


def transformers_llama(llama, context: int, **settings):  # type: ignore[no-untyped-def]
    """transformers' Llama with the same weights; the embeddings are tied."""
    from transformers import LlamaForCausalLM

    from minillama.checkpoint.huggingface import to_huggingface

    config = llama.config
    model = LlamaForCausalLM(transformers_config(config, context, **settings))
    weights = to_huggingface(llama.state_dict(), config)
    weights.pop("lm_head.weight", None)
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model


def litgpt_llama(llama, context: int):  # type: ignore[no-untyped-def]
    """litgpt's of the same sizes with weights of its own; the embeddings are tied."""
    from litgpt import GPT, Config

    config = llama.config
    model = GPT(
        Config(
            block_size=context,
            padded_vocab_size=config.vocab_size,
            vocab_size=config.vocab_size,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            n_query_groups=config.n_kv_heads,
            n_embd=config.dim,
            intermediate_size=config.hidden_dim,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
            norm_eps=config.norm_eps,
        )
    )
    model.lm_head.weight = model.transformer.wte.weight
    return model


def without_repacking() -> None:
    """Have llama.cpp leave the weights in the order of their file."""
    from llama_cpp import llama_cpp

    defaults = llama_cpp.llama_model_default_params

    def plain():  # type: ignore[no-untyped-def]
        options = defaults()
        options.use_extra_bufts = False
        return options

    llama_cpp.llama_model_default_params = plain


def bandwidth() -> float:
    """Bytes a second that are read from memory, at best."""
    import torch

    numbers, best = torch.ones(2**27), 0.0
    for _ in range(5):
        start = time.perf_counter()
        numbers.sum()
        best = max(best, numbers.nbytes / (time.perf_counter() - start))
    return best
