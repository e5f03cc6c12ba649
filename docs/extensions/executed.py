"""A directive whose code runs while the pages are built: what they print and draw is what the code does.

    ```{executed} python
    :session: linen

    print(1 + 1)
    ```

The code of one session, which is the page's own unless it is named, runs in one namespace, in the order of
the page. An exception fails the build. In ``console`` blocks the lines that begin with ``$`` run in a shell,
in a folder that the page has to itself; it is ``FOLDER`` in Python.

Options:
  session: the namespace; the page's default one if there is none.
  file: a file beside the page to run in the place of the block's own code.
  hide-code: show only what the code prints.
  markdown: what the code prints is a part of the page, such as a table.
  picture: the name of a PNG that the code writes to ``PICTURE``.
  alt: a text for those who do not see the picture.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

_ROOT = Path(__file__).parents[2]
_log = logging.getLogger(__name__)
_namespaces: dict[tuple[str, str], dict[str, Any]] = {}
_folders: dict[str, tempfile.TemporaryDirectory] = {}


class Executed(SphinxDirective):
    """Runs its content, and shows it with what it prints."""

    has_content = True
    required_arguments = 1  # python or console
    option_spec = {  # noqa: RUF012 (docutils' way)
        "session": directives.unchanged,
        "file": directives.unchanged,
        "hide-code": directives.flag,
        "markdown": directives.flag,
        "picture": directives.unchanged,
        "alt": directives.unchanged,
    }

    def run(self) -> list[nodes.Node]:
        """The nodes of the code and of its output."""
        self.env.note_reread()  # the package may have changed, though the page has not
        language, (source, line) = self.arguments[0], self.get_source_info()
        code = "\n".join(self.content)
        if name := self.options.get("file"):
            path = Path(source).parent / name
            code, source, line = path.read_text(), str(path), 0
        session = (self.env.docname, self.options.get("session", ""))
        try:
            if language == "console":
                return [_literal(_run_commands(code, self.env.docname), "console")]
            picture = self._picture()
            # As many lines before the code as the page has, so that a traceback tells the page's lines.
            output = _run_python("\n" * (self.content_offset if line else 0) + code, source, session, picture)
        except Exception as error:
            _log.warning("%s", error, location=(self.env.docname, line))
            return []
        shown: list[nodes.Node] = [] if "hide-code" in self.options else [_literal(code, "python")]
        if "markdown" in self.options:
            return shown + self.parse_text_to_nodes(output)
        if output:
            shown.append(_literal(output.rstrip("\n"), "text"))
        return shown + self._shown_picture()

    def _picture(self) -> Path | None:
        if (name := self.options.get("picture")) is None:
            return None
        path = Path(self.env.srcdir) / "_pictures" / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        return path

    def _shown_picture(self) -> list[nodes.Node]:
        if (name := self.options.get("picture")) is None:
            return []
        # An absolute URI is one from the top of the documentation; Sphinx copies what it names.
        return [nodes.image(uri=f"/_pictures/{name}", alt=self.options["alt"])]


def _literal(text: str, language: str) -> nodes.literal_block:
    block = nodes.literal_block(text, text)
    block["language"] = language
    return block


def _run_python(code: str, source: str, session: tuple[str, str], picture: Path | None) -> str:
    namespace = _namespaces.setdefault(session, {"__name__": "__main__"})
    namespace |= {"PICTURE": picture, "FOLDER": _folder(session[0])}
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            exec(compile(code, source, "exec"), namespace)
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == source]
        at = f"{source}:{frames[-1].lineno}: " if frames else ""
        raise RuntimeError(f"{at}{type(error).__name__}: {error}") from error
    if picture is not None and not picture.exists():
        raise RuntimeError(f"{source}: the code did not write {picture.name}")
    return output.getvalue()


def _folder(page: str) -> Path:
    if page not in _folders:
        _folders[page] = tempfile.TemporaryDirectory(prefix="docs-")
    return Path(_folders[page].name)


def _run_commands(text: str, page: str) -> str:
    """The commands of a console block, each with what it prints; lines without ``$`` are left out."""
    scripts = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")]),
        "COLUMNS": "100",
    }
    shown = []
    for line in text.splitlines():
        if not line.startswith("$ "):
            continue
        done = subprocess.run(
            line[2:],
            shell=True,
            cwd=_folder(page),
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if done.returncode:
            raise RuntimeError(f"{line}\nexit status {done.returncode}: {done.stdout[-2000:]}")
        shown += [line, *done.stdout.rstrip("\n").splitlines(), ""]
    return "\n".join(shown[:-1])


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the directive."""
    app.add_directive("executed", Executed)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
