"""Jinja2's immutable sandbox, in which a template can neither reach out nor take time or memory without bounds.

Whatever a template does is counted in steps: a turn of a loop, a call, an item or 256 characters of what it looks at.
The count depends on the template and the talk alone, not on the machine, so what is refused once is always refused.
"""

import re
from collections.abc import Callable, Iterable, Iterator, MappingView, Sized
from functools import wraps
from string import Formatter
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import BlockReference, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

STEPS = 1 << 22  # of one text; seconds
LONGEST = 1 << 22  # characters of a text
WIDEST = 1000  # that a format makes a value
CHARACTERS = 8  # 2 ** 8 of them are a step
CALL = 8  # steps
DIGITS = 4096  # bits of a number
DEEPEST = 1000  # lists in lists: Python counts no calls while it hashes, and falls off its stack
# what texts, lists and mappings can do in a template; not what makes them of any size, or of another kind
METHODS = {
    str: "capitalize casefold count endswith find format format_map index isalnum isalpha isascii isdecimal isdigit"
    " isidentifier islower isnumeric isprintable isspace istitle isupper join lower lstrip partition removeprefix"
    " removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title"
    " upper",
    (int, float): "is_integer real imag",
    (list, tuple): "count index",
    dict: "copy get items keys values",
    (bytes, bytearray, range): "",
}
LOOKING = ("attr", "count", "d", "default", "first", "last", "length")  # filters that do not go through a value
# filters that no talk needs: they depend on chance, or take long for what is short
GONE = ("pprint", "random", "urlize", "wordwrap", "xmlattr")
PERCENT = re.compile(r"%(?:\([^()]*\))?[#0\- +]*(\*|\d*)(?:\.(\*|\d*))?[hlL]?(.?)", re.DOTALL)


def _fields(text: str, percent: bool) -> int:
    """How many values a format puts in. Raises TemplateError for one that makes them wide."""
    if percent:
        found = [match.groups() for match in PERCENT.finditer(text)]
        if any(kind not in "diouxXeEfFgGcrsa%" or not kind for *_, kind in found):
            raise TemplateError("% is followed by what is no format")
        widths = [width for *both, _ in found for width in both if width]
    else:
        found = [(field, spec) for _, field, spec, _ in Formatter().parse(text) if field is not None]
        widths = [width for _, spec in found for width in re.findall(r"\d+|\{", spec or "")]
    if any(width in "*{" for width in widths):
        raise TemplateError("a width in a format that stands elsewhere is not allowed")
    if any(len(width) > 9 or int(width) > WIDEST for width in widths):
        raise TemplateError(f"a format with a width of over {WIDEST} makes something too large")
    return len(found)


def _held(value: Any) -> Any:
    """The value; of one that gives items as they are asked for, a list of them, which can be counted before."""
    lazy = isinstance(value, Iterator) and not isinstance(value, LoopContext)
    return list(value) if lazy else value


class _Code(CodeGenerator):
    """Has the sandbox count what is written out, compared, cut, joined by `~` or looked up."""

    def blockvisit(self, nodes_: Iterable[nodes.Node], frame: Frame) -> None:
        """The body of a loop, a condition, a macro: a step, and the text that it writes as it stands."""
        body = list(nodes_)
        texts = [part for node in body if isinstance(node, nodes.Output) for part in node.nodes]
        size = sum(len(part.data) for part in texts if isinstance(part, nodes.TemplateData))
        self.writeline(f"environment.step({1 + (size >> CHARACTERS)})")
        super().blockvisit(body, frame)

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        if node.test is not None:
            node.test = nodes.And(nodes.EnvironmentAttribute("step(1)"), node.test)
        super().visit_For(node, frame)

    def _weighed(self, node: nodes.Node, frame: Frame) -> None:
        self.write("environment.weighed(")
        self.visit(node, frame)
        self.write(")")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        self.write("(")
        self._weighed(node.expr, frame)
        for operand in node.ops:
            self.visit(operand, frame)
        self.write(")")

    def visit_Operand(self, node: nodes.Operand, frame: Frame) -> None:
        super().visit_Operand(nodes.Operand(node.op, nodes.EnvironmentAttribute("weighed")), frame)
        self.write("(")
        self.visit(node.expr, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self.write("{")
        for item in node.items:
            self._weighed(item.key, frame)
            self.write(": ")
            self.visit(item.value, frame)
            self.write(", ")
        self.write("}")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        cut = isinstance(node.arg, nodes.Slice)
        self.write("environment.weighed(" if cut else "")
        super().visit_Getitem(node, frame)
        self.write(")" if cut else "")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox; `steps` are left to the template that runs, `begin` gives it all of them."""

    intercepted_binops = frozenset(["*", "**", "%", "+"])
    code_generator_class = _Code

    def __init__(self, **more: Any):
        # not optimized: what is worked out beforehand would not be counted
        super().__init__(finalize=self.weighed, optimized=False, **more)
        self.begin()
        self.filters = {name: self._filter(name, use) for name, use in self.filters.items() if name not in GONE}
        self.tests = {name: self._test(use) for name, use in self.tests.items()}
        del self.globals["lipsum"]

    def add_filter(self, name: str, use: Callable[..., Any]) -> None:
        """A filter of ours, or another of that name; counted as all are."""
        self.filters[name] = self._filter(name, use)

    def begin(self) -> None:
        """Another text is laid out."""
        self.steps = STEPS

    def step(self, count: int) -> bool:
        """Count steps; True, so that it can stand in a condition. Raises TemplateError when none are left."""
        self.steps -= count
        if self.steps < 0:
            raise TemplateError(
                f"takes more than {STEPS:,} steps; a loop in it has no bounds, or something is too large"
            )
        return True

    def weigh(self, *values: Any) -> int:
        """Count what values hold, to the last item of an item, and say how much that was."""
        before, level = self.steps, list(values)
        for _ in range(DEEPEST):
            level = [item for value in level for item in self._items(value)]
            if not level:
                return before - self.steps
        raise TemplateError(f"what stands in what is more than {DEEPEST} deep")

    def _items(self, value: Any) -> list:
        """What stands in a value, which is counted."""
        if isinstance(value, str):
            self.step(1 + (len(value) >> CHARACTERS))
            if len(value) > LONGEST:
                raise TemplateError(f"a text of over {LONGEST:,} characters is too large")
            return []
        self.step(1 + (len(value) if isinstance(value, Sized) else 0))
        if isinstance(value, list | tuple | MappingView):
            return list(value)
        if isinstance(value, dict):
            return [*value.keys(), *value.values()]
        if isinstance(value, Namespace):
            return [value._Namespace__attrs]
        if isinstance(value, int) and value.bit_length() > DIGITS:
            raise TemplateError("a number is too large")
        return []

    def weighed(self, value: Any) -> Any:
        """The value, counted."""
        self.weigh(value)
        return value

    def concat(self, parts: tuple) -> str:
        """`a ~ b`."""
        self.weigh(parts)
        return self.weighed("".join(map(str, parts)))

    def _room(self, characters: int, name: str) -> None:
        if characters > LONGEST:
            raise TemplateError(f"{name} makes something too large")

    def _grown(self, name: str, text: Any, given: list) -> None:
        """Look at what makes a text larger by more than it is given."""
        words = [word for word in given if isinstance(word, str)]
        numbers = [number for number in given if isinstance(number, int)]
        if name == "replace" and len(words) > 1:
            self._room(str(text).count(words[0]) * len(words[1]), name)
        elif name == "join" and words:
            self._room(len(text) * len(words[0]), name)
        elif name == "indent":
            self._room(str(text).count("\n") * max([*numbers, *map(len, words)], default=4), name)
        elif name in ("%", "format"):
            self.step(_fields(str(text), True) * self.weigh(given))
        elif name == "sum" and any(isinstance(start, list | tuple) for start in given):
            raise TemplateError("sum adds numbers alone")

    def _filter(self, name: str, use: Callable[..., Any]) -> Callable[..., Any]:
        first = 1 if hasattr(use, "jinja_pass_arg") else 0  # an argument of jinja2's own

        @wraps(use)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            values = list(args)
            if name in LOOKING or len(values) <= first:
                self.step(1)
                if name == "attr":
                    self.weigh(values[first + 1 :], kwargs)
                return use(*args, **kwargs)
            values[first:], kwargs = map(_held, values[first:]), {key: _held(each) for key, each in kwargs.items()}
            given = [*values[first + 1 :], *kwargs.values()]
            self.step(CALL)
            self.weigh(values[first], given)
            for number in given:
                if isinstance(number, int):
                    self.step(abs(number))
                if name == "round" and isinstance(number, int) and abs(number) > WIDEST >> 2:
                    raise TemplateError("round to so many digits is too large")
            self._grown(name, values[first], given)
            found = use(*values, **kwargs)
            return found if isinstance(found, Iterator) else self.weighed(found)

        return bounded

    def _test(self, use: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(use)
        def bounded(*args: Any, **kwargs: Any) -> bool:
            self.step(1)
            if len(args) > 1 or (args and isinstance(args[0], str)):
                self.weigh(*args)
            return use(*args, **kwargs)

        return bounded

    def call(self, context, obj, /, *args: Any, **kwargs: Any) -> Any:
        """Calls; of what is not the template's own, with what goes in and comes out counted."""
        self.step(CALL)
        if isinstance(obj, Macro | BlockReference | LoopContext):
            return super().call(context, obj, *args, **kwargs)
        args, kwargs = tuple(map(_held, args)), {name: _held(value) for name, value in kwargs.items()}
        given = [*args, *(value for name, value in kwargs.items() if not name.startswith("_"))]
        self.weigh(given)
        text = getattr(obj, "__self__", None)
        if isinstance(text, str | list | tuple):
            self.weigh(text)
        if isinstance(text, str):
            name = getattr(obj, "__name__", "")
            if name == "join" and given:
                whole = list(given[0])
                self._grown(name, whole, [text])
                args = (whole,)
            elif name == "replace":
                self._grown(name, text, given)
        found = super().call(context, obj, *args, **kwargs)
        return self.weighed(found) if isinstance(found, str | int | list | tuple) else found

    def getitem(self, obj: Any, argument: Any) -> Any:
        """`a[b]`."""
        if not isinstance(argument, str | int):
            self.weigh(argument)
        return super().getitem(obj, argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Of texts, numbers, lists and mappings what METHODS name."""
        for kind, names in METHODS.items():
            if isinstance(obj, kind):
                return attr in names.split()
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:
        """`format` of a text, of bearable widths."""
        found = super().wrap_str_format(value)
        if found is None:
            return None
        text = value.__self__

        @wraps(found)
        def bounded(*args: Any, **kwargs: Any) -> str:
            self.step(_fields(text, False) * self.weigh(args, kwargs))
            return self.weighed(found(*args, **kwargs))

        return bounded

    def call_binop(self, context, operator: str, left: Any, right: Any) -> Any:
        """`*` and `**` of small things, `%` to bearable widths."""
        weight = self.weigh(left) + self.weigh(right)
        if operator == "%" and isinstance(left, str):
            self._grown(operator, left, [right])
        elif operator in ("*", "**"):
            sized = [len(side) for side in (left, right) if isinstance(side, Sized)]
            numbers = [abs(side) for side in (left, right) if isinstance(side, int)]
            if sized and numbers:
                self._room(sized[0] * numbers[0], operator)
                self.step(weight * numbers[0])
            elif operator == "**" and len(numbers) == 2 and numbers[0].bit_length() * numbers[1] > DIGITS:
                raise TemplateError(f"{operator} makes something too large")
        return self.weighed(super().call_binop(context, operator, left, right))
