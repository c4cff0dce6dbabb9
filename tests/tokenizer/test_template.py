"""Templates of hubs lay talks out in a sandbox, and it stays known whose words are whose."""

import json

import pytest

from rwkvpipe.base.errors import DataError
from rwkvpipe.tokenizer import bounds, chat
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
        ("{{ 10 ** (10 ** 10) }}", "too large"),
        ("{{ '%1000000000d' % 5 }}", "too large"),
        ("{{ '%*d' % (10 ** 9, 5) }}", "not allowed"),
        ("{{ '%.999999999f' % 0.5 }}", "too large"),
        ("{{ '%((a))999999999d' % {'(a)': 1} }}", "no format"),
        ("{{ ('{0}' * 100000).format('a' * 1000000) }}", "takes more than"),
        ("{{ ('%(a)s' * 100000) | format(a='a' * 1000000) }}", "takes more than"),
        ("{{ '{a:>99999}'.format_map({'a': 1}) }}", "too large"),
        ("{{ 'a'.center(10 ** 10) }}", "unsafe"),
        ("{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "too large"),
        ("{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}", "too large"),
        ("{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = [n.x, n.x] | join %}{% endfor %}", "too"),
        (
            "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x.replace('a','aa') %}{% endfor %}",
            "too",
        ),
        ("{{ 'a' | center(10 ** 9) }}", "too large"),
        ("{{ '{:>1000000000}'.format(1) }}", "too large"),
        ("{{ '{:>{}}'.format(1, 10 ** 9) }}", "not allowed"),
        ("{{ '%01000000000d' | format(1) }}", "too large"),
        ("{{ ('a' * 1000000) | replace(old='a', new='b' * 1000) }}", "too large"),
        ("{{ ('b' * 1000000).join(range(9999) | map('string')) }}", "too large"),
        ("{{ range(9999) | map('string') | join('b' * 1000000) }}", "too large"),
        ("{{ ('a\\n' * 100000) | indent(1000000) }}", "too large"),
        ("{{ messages | tojson(indent=1000000) }}", "indent"),
        ("{{ [[1]] | sum(start=[]) }}", "numbers alone"),
        ("{{ 1 | round(1000000, 'ceil') }}", "too large"),
        ("{{ (1).to_bytes(10 ** 9, 'big') }}", "unsafe"),
        ("{{ 'a'.encode() * 10 ** 10 }}", "unsafe"),
        ("{{ 'a'.translate({97: 'b'}) }}", "unsafe"),
        ("{{ lipsum(n=100000) }}", "undefined"),
        ("{{ [1] | random }}", "No filter named"),
        ("{% for a in [1] %}" * 25 + "{% endfor %}" * 25, "too deep"),
        ("{{ " + "9" * 5000 + " }}", "4300 digits"),
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


LOOP, END = "{% for a in range(99999) %}", "{% endfor %}"
TREE = "{% set n = namespace(x=('a',)) %}{% for i in range(60) %}{% set n.x = (n.x, n.x) %}{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        LOOP * 3 + END * 3,
        LOOP + "{% for b in range(99999) if b < 0 %}{% endfor %}" + END,
        LOOP + "{% set x = range(99999) | sum %}" + END,
        LOOP + "{% set x = [1] | slice(4000) | list %}" + END,
        "{% set l = range(9999) | list %}" + LOOP + "{% set x = -1 in l %}" + END,
        "{% set l = range(9999) | list %}" + LOOP + "{% set x = l[1:] %}" + END,
        "{% set l = 'a' * 400000 %}" + LOOP + "{% set x = l.upper() %}" + END,
        "{% set l = 'a' * 400000 %}" + LOOP + "{% set x = l is eq 'b' %}" + END,
        "{% set x %}" + LOOP + "y" * 3000 + END + "{% endset %}",
        "{% macro f(n) %}{% if n %}{% set x = f(n-1) ~ f(n-1) %}{% endif %}{% endmacro %}{{ f(40) }}",
        "{% for a in [1, 2] recursive %}{{ loop([1, 2]) if loop.depth < 40 }}{% endfor %}",
        TREE + "{{ n.x }}",
        TREE + "{{ n }}",
        TREE + "{{ n.x | tojson }}",
        TREE + "{{ {n.x: 1} }}",
        TREE + "{{ {}[n.x] }}",
        TREE + "{{ '%s' % [n.x] }}",
        TREE + "{{ n.x ~ 'a' }}",
        TREE + "{{ {1: n.x}.items() }}",
        TREE + "{{ [{1: n.x}.values()] | string }}",
        TREE + "{{ [n.x] | select | unique | list }}",
        TREE + "{{ dict([(n.x, 1)] | select) }}",
        TREE + "{{ {} | attr(n.x) }}",
        TREE + "{{ {} | attr(name=n.x) }}",
    ],
)
def test_what_writes_nothing_ends_too(source, monkeypatch):
    monkeypatch.setattr(bounds, "STEPS", 30_000)
    with pytest.raises(DataError, match="takes more than 30,000 steps"):
        ChatTemplate(source).text(TALK)


DEEP = "{% set n = namespace(x=('a',)) %}{% for i in range(1100) %}{% set n.x = (n.x,) %}{% endfor %}"


@pytest.mark.parametrize(
    "use",
    [
        "{n.x: 1}",
        "{}[n.x]",
        "{}.get(n.x)",
        "n.x in {}",
        "[n.x] | unique | list",
        "{} | attr(n.x)",
        "[{}] | map(attribute=n.x) | list",
        "dict([(n.x, 1)])",
        "n.x | tojson",
        "n.x == (1,)",
    ],
)
def test_what_is_deeper_than_python_s_stack_is_refused_before_python_falls_off_it(use):
    with pytest.raises(DataError, match="more than 1000 deep"):
        ChatTemplate(DEEP + "{{ " + use + " }}").text(TALK)
    assert ChatTemplate(DEEP.replace("1100", "500") + "{{ n.x in {} }}").text(TALK) == "False"


def test_a_refusal_does_not_depend_on_what_was_laid_out_before(monkeypatch):
    monkeypatch.setattr(bounds, "STEPS", 2_000)
    template = ChatTemplate(MARKED)
    assert [template.text(TALK) for _ in range(100)] == [template.text(TALK)] * 100


def test_digits_and_per_cents_of_a_format_s_text_are_no_widths():
    for source, text in [
        ("{{ '%s of 100000 %%' % 7 }}", "7 of 100000 %"),
        ("{{ '{} of 2026-11-21T12345'.format('a') }}", "a of 2026-11-21T12345"),
        ("{{ '%-8s|%05.2f|%(x)s' | replace('%(x)s', '') | format('a', 2.5) }}", "a       |02.50|"),
        ("{{ '{0:>8}{1:05d}{{x}}'.format('a', 42) }}", "       a00042{x}"),
        ("{{ 123456789012345678 * 10 ** 20 }}", "12345678901234567800000000000000000000"),
        (
            "{{ [1, none, {'b': 'é'}] | tojson(indent=1, separators=(',', ':')) }}",
            '[\n 1,\n null,\n {\n  "b":"é"\n }\n]',
        ),
    ]:
        assert ChatTemplate(source).text([]) == text


# what published templates use, in words of our own
TOOLED = """{{- bos_token }}
{%- set ns = namespace(last=messages | length - 1, found=false) %}
{%- if strftime_now is defined %}{{- 'Year: ' ~ (strftime_now('%Y') | length) ~ '\n' }}{%- endif %}
{%- if tools is defined and tools %}
    {%- for tool in tools %}{{- tool.function | tojson(indent=4) ~ '\n' }}{%- endfor %}
{%- endif %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and not ns.found and not message.content.startswith('<tool') %}
        {%- set ns.last = messages | length - 1 - loop.index0 %}{%- set ns.found = true %}
    {%- endif %}
{%- endfor %}
{%- macro turn(role) %}{{- '<|' + role + '|>' }}{{ caller() | trim }}<|end|>{%- endmacro %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}{{ raise_exception('role') }}{%- endif %}
    {%- if message.role == 'tool' %}{%- continue %}{%- endif %}
    {%- call turn(message.role) %}
        {%- if message.role == 'assistant' and '</think>' in message.content and loop.index0 < ns.last %}
            {{- message.content.split('</think>')[-1].lstrip('\n') }}
        {%- else %}{{- message.content }}{%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- for name, value in call.function.arguments.items() %}{{- name ~ '=' ~ value | string }}{%- endfor %}
        {%- endfor %}
    {%- endcall %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""


def test_what_published_templates_use_works():
    call = {"function": {"name": "f", "arguments": {"n": 12345, "city": "Ulm"}}}
    talk = [
        {"role": "user", "content": " Hi "},
        {"role": "assistant", "content": "<think>\nhm\n</think>\nyes", "tool_calls": [call]},
        {"role": "tool", "content": "x"},
        {"role": "user", "content": "So?"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "about": "<é>"}}]
    found = ChatTemplate(TOOLED, {"bos_token": "<s>"}).text(talk, prompt=True, tools=tools)
    listed = '{\n    "name": "f",\n    "about": "<é>"\n}\n'
    said = "<|user|>Hi<|end|><|assistant|>yesn=12345city=Ulm<|end|><|user|>So?<|end|><|assistant|>"
    assert found == f"<s>Year: 4\n{listed}{said}"
    with pytest.raises(DataError, match="cannot lay out the talk: role"):
        ChatTemplate(TOOLED).text([{"role": "critic", "content": "no"}])


def test_generation_tags_say_what_is_learned():
    source = (
        "{% for m in messages %}{{ '<' + m.role + '>' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}\n{% endfor %}{{ messages | length }}"
    )
    parts = [*ChatTemplate(source).segments(TALK)]
    assert [text for text, learned in parts if learned] == ["Hello!</s>", "No more.</s>"]
    assert "".join(text for text, _ in parts) == ChatTemplate(source).text(TALK)
    one = [turn | {"train": False} if turn["content"] == "Hello!" else turn for turn in TALK]
    assert [text for text, learned in ChatTemplate(source).segments(one) if learned] == ["No more.</s>"]
    twice = source.replace("{% else %}", "{% generation %}!{% endgeneration %}{% else %}")
    assert [text for text, learned in ChatTemplate(twice).segments(TALK[:3]) if learned] == ["Hello!</s>", "!"]
    with pytest.raises(DataError, match="4 generation tags for 2 replies"):
        list(ChatTemplate(twice).segments(one))
    # without the tags nobody could tell: the number at the end changes
    with pytest.raises(DataError, match="generation tags"):
        list(ChatTemplate(source.replace("{% generation %}", "").replace("{% endgeneration %}", "")).segments(TALK))


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
