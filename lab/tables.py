"""Tables of the lab's programs: Markdown whose columns are aligned, for a terminal and a page."""

import re
from collections.abc import Iterable, Sequence

NUMBER = re.compile(r"[-+−*~<]*\d.*|-?( \(.*\))?")  # a figure with its sign, spread or unit; a gap


def format_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns of numbers are aligned to the right, others to the left. Short rows are filled up."""
    cells = [[str(cell) for cell in row] for row in rows]
    cells = [row + [""] * (len(head) - len(row)) for row in cells]
    columns = list(zip(head, *cells))
    lines = [[] for _ in range(len(cells) + 2)]
    for title, *values in columns:
        width = max(3, len(title), *map(len, values))
        right = any(values) and all(map(NUMBER.fullmatch, values))
        rule = "-" * (width - right) + ":" * right
        side = ">" if right else "<"
        for line, text in zip(lines, (title, rule, *values)):
            line.append(f"{text:{side}{width}}")
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
