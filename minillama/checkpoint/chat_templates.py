"""The chat formats as other programs want them: Jinja, which they run and minillama never does."""

_BEGIN = (
    "{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content %}{% set turns = messages[1:] %}"
    "{% else %}"
    "{% set system = none %}{% set turns = messages %}"
    "{% endif %}"
)

# As `minillama.chat.encode_dialog` writes them. What frames Code Llama 70B's messages differs from
# tokenizer to tokenizer, so that no template says it.
TEMPLATES = {
    "llama2": _BEGIN + "{% for message in turns %}"
    "{% if message.role == 'user' %}"
    "{% if loop.first and system is not none %}"
    "{% set said = ('<<SYS>>\\n' ~ system ~ '\\n<</SYS>>\\n\\n' ~ message.content) | trim %}"
    "{% else %}"
    "{% set said = message.content | trim %}"
    "{% endif %}"
    "{{ bos_token ~ '[INST] ' ~ said ~ ' [/INST]' }}"
    "{% else %}"
    "{{ ' ' ~ (message.content | trim) ~ ' ' ~ eos_token }}"
    "{% endif %}"
    "{% endfor %}",
    "alpaca": _BEGIN + "{{ bos_token ~ 'Below is an instruction that describes a task' }}"
    "{% if turns | length > 2 %}"
    "{{ raise_exception('The format has one question and one answer.') }}"
    "{% endif %}"
    "{% if system is not none %}"
    "{{ ', paired with an input that provides further context' }}"
    "{% endif %}"
    "{{ '. Write a response that appropriately completes the request.\\n\\n### Instruction:\\n' }}"
    "{% if system is not none %}"
    "{{ system ~ '\\n\\n### Input:\\n' }}"
    "{% endif %}"
    "{{ turns[0].content ~ '\\n\\n### Response:' }}"
    "{% if turns | length > 1 %}"
    "{{ turns[1].content ~ eos_token }}"
    "{% endif %}",
    "chatml": "{% for message in messages %}"
    "{{ '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% endif %}",
}


def format_of(template: str | None) -> str | None:
    """The chat format of a template, where it is one of these, letter by letter."""
    return next((name for name, ours in TEMPLATES.items() if ours == template), None)
