"""transformers' Llama, the independent implementation that ours is compared with."""

from minillama.checkpoint.huggingface import to_huggingface
from minillama.config import LlamaConfig
from minillama.model import Llama


def transformers_llama(config: LlamaConfig, **settings):
    """An untrained one of these sizes."""
    import transformers  # here, since it takes seconds

    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=config.dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            intermediate_size=config.hidden_dim,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embeddings,
            **settings,
        )
    )


def transformers_copy(model: Llama):
    """One with the weights of ours."""
    theirs = transformers_llama(model.config, attn_implementation="eager").eval()
    theirs.load_state_dict(to_huggingface(model.state_dict(), model.config))
    return theirs
