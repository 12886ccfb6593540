"""Chat templates with the structure of the families' checkpoints, traps included.

Some templates begin with a token that the tokenizer adds as well (idefics3, gemma3). The text
before an answer is not always the generation prompt: llava_onevision writes "assistant \\n" in a
dialogue and "assistant\\n" as the prompt; llava and idefics put a space before the answer.
"""

from __future__ import annotations


def _texts(before: str = "", after: str = "") -> str:
    return (
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        + f"{{{{ '{before}' + content['text'] + '{after}' }}}}"
        + "{% endfor %}"
    )


def _images(image: str) -> str:
    return (
        "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
        + f"{{{{ '{image}' }}}}"
        + "{% endfor %}"
    )


# idefics3 and smolvlm; BOS is <|begin_of_text|> and <|im_start|>
IDEFICS = (
    "BOS{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}"
    "{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

LLAVA = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    + _images("<image>\\n")
    + _texts(after=" ")
    + "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

LLAVA_MISTRAL = (  # llava-v1.6-mistral
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    + _images("<image>\\n")
    + _texts()
    + "{{ ' [/INST]' }}"
    + "{% elif message['role'] == 'assistant' %}"
    + "{{ ' ' + message['content'][0]['text'] + '</s> '}}"
    + "{% endif %}{% endfor %}"
)

LLAVA_ONEVISION = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    + _images("<image>")
    + _texts(before="\\n")
    + "{{'<|im_end|>'}}{% endfor %}"
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

GEMMA = (
    "{{ bos_token }}{%- for message in messages -%}"
    "{%- if (message['role'] == 'assistant') -%}{%- set role = 'model' -%}"
    "{%- else -%}{%- set role = message['role'] -%}{%- endif -%}"
    "{{ '<start_of_turn>' + role + '\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] | trim }}"
    "{%- else -%}{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}"
    "{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)

_QWEN_SYSTEM = (
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
)
QWEN3 = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN2 = QWEN3.replace("<|im_start|>{{", _QWEN_SYSTEM + "<|im_start|>{{", 1)

INTERNVL = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
