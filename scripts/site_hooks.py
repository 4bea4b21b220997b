"""What the documentation site needs beyond the pages of docs/ (mkdocs.yml names this file).

The pages are written for readers of the repository, and link to files beside docs/. In the site each such file has a
page of its own: Markdown as it stands, a source highlighted, a folder as a list of what is in it. A page that the
navigation does not name stands under "More", so that none is lost.
"""

import ast
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PROJECT = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
LANGUAGES = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".service": "ini", ".cpp": "cpp", ".h": "cpp"}
_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
_FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name every page: those that `nav` leaves out, and those of the project."""
    named = set(re.findall(r"[\w./-]+\.md", repr(config.nav)))
    more: list[Any] = sorted(page.name for page in Path(config.docs_dir).glob("*.md") if page.name not in named)
    project = [{name.removesuffix(".md").capitalize(): f"project/{name}"} for name in PROJECT]
    assert config.nav is not None
    config.nav += [{"More": more}] * bool(more) + [{"Project": project}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the project, and one for every file beside docs/ that a page links to."""
    pages = {f"project/{name}": (ROOT / name).read_text(encoding="utf-8") for name in PROJECT}
    pages = {path: _moved(text, "") for path, text in pages.items()}
    texts = [*pages.values(), *(_moved(page.content_string, "docs") for page in files.documentation_pages())]
    for path in sorted({path for text in texts for path in re.findall(r"\]\((?:\.\./)?source/([^)#]+)\.md\)", text)}):
        pages[f"source/{path}.md"] = _source(path)
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead the links of a page of docs/ to where the site has what they name."""
    markdown = markdown if page.file.generated_by else _moved(markdown, "docs")
    return re.sub(r"-->\n\|", "-->\n\n|", markdown)  # a table right below a comment is one on GitHub, and text here


def _moved(text: str, folder: str) -> str:
    """A page of `folder` of the repository with its links as they are in the site; fenced text is left alone."""
    up = "" if folder else "../"  # pages of the project lie in project/

    def link(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, found[2]))
        if path.startswith("docs/"):
            target = up + path.removeprefix("docs/")
        elif path in PROJECT:
            target = f"{up}project/{path}"
        elif path == "README.md":
            target = f"{up}index.md"
        elif (ROOT / path).exists():
            target = f"{up}source/{path}.md"
        else:
            return found[0]  # mkdocs says that it leads nowhere
        return found[1] + target + (")" if target.startswith(f"{up}source/") else found[3])

    kept = _FENCE.findall(text)
    parts = [_LINK.sub(link, part) for part in _FENCE.split(text)]
    return "".join(part + fence for part, fence in zip(parts, [*kept, ""], strict=True))


def _source(path: str) -> str:
    """The page of a file or folder of the repository."""
    here = ROOT / path
    if here.is_dir():
        names = sorted(name for name in os.listdir(here) if not name.startswith(("_", ".")) and "." in name)
        rows = [f"| `{name}` | {_first_line(here / name)} |" for name in names]
        return "\n".join([f"# {path}/", "", "| file | |", "|---|---|", *rows, ""])
    language = LANGUAGES.get(here.suffix, "text")
    return f"# {path}\n\n````{language}\n{here.read_text(encoding='utf-8')}\n````\n"


def _first_line(path: Path) -> str:
    """Of a module's docstring."""
    told = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path.suffix == ".py" else None
    return (told or "").split("\n")[0].replace("|", "\\|")
