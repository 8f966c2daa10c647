"""Progress: a bar on a terminal, plain lines elsewhere."""

import io
import sys
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from runtime.ranks import RANK


class PlainLines(io.TextIOBase):
    """Where tqdm writes if there is no terminal: each state of a bar becomes a line."""

    def write(self, text):
        if text.strip():
            print(text.strip(), flush=True)


def progress_bar(total, description, unit, done=0, **options):
    """A tqdm bar on a terminal, elsewhere a plain line a minute; on rank 0 only."""
    if not sys.stderr.isatty():
        options["file"] = PlainLines()
        options["mininterval"] = 60
        options["maxinterval"] = 60
        options["delay"] = 60
        options["ncols"] = 0
    return tqdm(
        total=total,
        initial=done,
        desc=description,
        unit=unit,
        disable=RANK > 0,
        leave=False,
        **options,
    )


def in_threads(function, items, bar):
    """[function(item) for item in items], by a pool of threads; `bar` counts them."""

    def task(item):
        result = function(item)
        bar.update()
        return result

    with ThreadPoolExecutor() as pool:
        return list(pool.map(task, items))
