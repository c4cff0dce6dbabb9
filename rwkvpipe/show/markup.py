"""HTML out of Python values: whatever is not markup already is escaped."""

import html
import re

# most control characters may not stand in HTML at all; they are shown by their pictures
_CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
_CONTROLS |= {code: 0xFFFD for code in range(128, 160)}
EMPTY = ("img", "meta", "br", "rect", "path", "circle")


class Html(str):
    """Text that is markup already."""


def escape(value: object) -> Html:
    """A value as HTML text, safe between tags and inside quoted attributes; markup stays what it is."""
    if isinstance(value, Html):
        return value
    text = str(value).replace("\r\n", "\n").translate(_CONTROLS)
    # JSON may hold half a surrogate pair, UTF-8 may not
    text = text.encode("utf-8", "replace").decode("utf-8")
    return Html(html.escape(text))


def join(parts, between: str = "") -> Html:
    """Several pieces as one; those that are not markup are escaped."""
    return Html(between.join(escape(part) for part in parts))


def el(tag: str, /, *inside: object, **attributes: object) -> Html:
    """An element. `klass` is class, other underscores are hyphens; an attribute that is None is left out."""
    words = [tag]
    for key, value in attributes.items():
        if value is not None:
            words.append(f'{"class" if key == "klass" else key.replace("_", "-")}="{escape(value)}"')
    if tag in EMPTY:
        return Html(f"<{' '.join(words)}/>")  # a shape of SVG needs the stroke, the others allow it
    return Html(f"<{' '.join(words)}>{join(inside)}</{tag}>")


def anchor(name: str) -> str:
    """A name as the target of a link within the page."""
    return "at-" + re.sub(r"[^A-Za-z0-9_-]", "-", name)


def facts(pairs: dict[str, object], klass: str = "facts") -> Html:
    """A list of names with their values; what is None is left out."""
    shown = [el("div", el("dt", name), el("dd", value)) for name, value in pairs.items() if value is not None]
    return el("dl", *shown, klass=klass) if shown else Html("")


def fold(title: object, *inside: object, opened: bool = False) -> Html:
    """Something that opens on demand."""
    return el("details", el("summary", title), *inside, open="" if opened else None)


def count(number: float) -> str:
    """A whole number with thousands set apart."""
    return f"{number:,.0f}"


def rough(number: float) -> str:
    """About how many: 950, 12,300, 1.24 million."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g} {word}" if number < 999.5 * size else f"{count(number / size)} {word}"
    return count(number)


def brief(seconds: float) -> str:
    """A time where there is little room: 0.4 s, 12 s, 3.1 min, 2.2 h."""
    for size, word in ((3600, "h"), (60, "min")):
        if seconds >= size - 0.5:
            return f"{seconds / size:.1f} {word}"
    return duration(seconds)


def duration(seconds: float) -> str:
    """A time as people say it: 0.4 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
