"""Templates of hubs lay talks out in a sandbox, and it stays known whose words are whose."""

import json

import pytest

from rwkvpipe.base.errors import DataError
from rwkvpipe.tokenizer import chat
from rwkvpipe.tokenizer.byte import ByteTokenizer
from rwkvpipe.tokenizer.template import ChatTemplate, load_template

MARKED = (
    "{%- for message in messages -%}\n"
    "    <|{{ message.role }}|>{{ message['content'] }}{{ eos_token }}\n"
    "{%- endfor -%}\n"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "No more."},
    {"role": "user", "content": "Thanks"},
]
# the form of released models, written as a template
RWKV = (
    "{% for m in messages %}{{ {'user': 'User', 'assistant': 'Assistant', 'system': 'System'}[m.role] }}: "
    "{{ m.content }}\n\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def test_the_assistant_s_words_and_what_ends_them_are_learned():
    ids, mask = ChatTemplate(MARKED, {"eos_token": "</s>"}).render(TALK, ByteTokenizer(0))
    learned = bytes(i for i, m in zip(ids, mask, strict=True) if m).decode()
    assert learned == "Hello!</s>No more.</s>"
    assert bytes(ids).decode().endswith("<|user|>Thanks</s>")


def test_a_prompt_ends_where_the_assistant_begins():
    assert ChatTemplate(MARKED, {"eos_token": "</s>"}).text(TALK[:2], prompt=True).endswith("Hi</s><|assistant|>")


def test_the_form_of_released_models_as_a_template_gives_the_same_ids():
    for talk in (TALK[:3], TALK[:5], TALK):
        assert ChatTemplate(RWKV).render(talk, ByteTokenizer(1)) == chat.render(talk, ByteTokenizer(1))


@pytest.mark.parametrize(
    "source, problem",
    [
        ("{% for %}", "no Jinja template"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "too deep"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages.__init__.__globals__ }}", "unsafe"),
        ("{{ 'a' * 10**10 }}", "too large"),
        ("{{ 10 ** 10 ** 10 }}", "too large"),
        ("{{ '%1000000000d' % 5 }}", "not allowed"),
        ("{{ 'a'.center(10 ** 10) }}", "unsafe"),
        ("{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "too large"),
        ("{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}", "too large"),
        ("{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = [n.x, n.x] | join %}{% endfor %}", "too"),
        (
            "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x.replace('a','aa') %}{% endfor %}",
            "too",
        ),
        ("{{ 'a' | center(10 ** 9) }}", "too large"),
        ("{{ '{:>1000000000}'.format(1) }}", "not allowed"),
        ("{{ '{:>{}}'.format(1, 10 ** 9) }}", "not allowed"),
        ("{{ '%01000000000d' | format(1) }}", "not allowed"),
        ("{{ [1] | batch(10 ** 9, 'x') | list }}", "too large"),
        ("{% for n in range(10 ** 9) %}x{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "without end"),
        ("{{ missing.part.part }}", "undefined"),
        ("{% include '/etc/passwd' %}", "cannot lay out"),
    ],
)
def test_what_is_broken_or_reaches_out_is_refused(source, problem):
    with pytest.raises(DataError, match=problem):
        ChatTemplate(source).text(TALK)


def test_a_template_that_rewrites_what_it_said_is_refused_for_learning():
    source = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="changes what stood before"):
        ChatTemplate(source).render(TALK, ByteTokenizer(0))


def test_templates_of_a_hub_s_folder_are_found(tmp_path):
    with pytest.raises(DataError, match="no chat template there"):
        load_template(tmp_path)
    config = {"chat_template": MARKED, "eos_token": {"content": "<e>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_template(tmp_path).text(TALK[:1]) == "<|system|>Be brief.<e>"
    assert load_template(tmp_path / "tokenizer_config.json").text(TALK[:1]) == "<|system|>Be brief.<e>"
    config["chat_template"] = [{"name": "tool", "template": "x"}, {"name": "default", "template": "y{{ eos_token }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_template(tmp_path).text(TALK) == "y<e>"
    (tmp_path / "chat_template.jinja").write_text("z{{ messages | tojson }}")
    assert load_template(tmp_path).text([{"role": "user", "content": "<é>"}]) == 'z[{"role": "user", "content": "<é>"}]'


def test_templates_that_are_no_text_or_no_templates_are_named(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": ["default"]}')
    with pytest.raises(DataError, match="no chat template"):
        load_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        load_template(tmp_path)
