"""`manyhands lab claims`: what two introductions say of mixtures of experts, and what is so."""

from typing import Annotated

import typer

from manyhands.errors import CheckFailed, UserError
from manyhands.terminal import styled


def claims(
    check: Annotated[
        bool,
        typer.Option("--check", help="Every figure, computed now, beside the document's; exit code 4 if one is off."),
    ] = False,
    document: Annotated[
        str | None, typer.Option(metavar="A|B", help="Only the claims of one document, by letter or title.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="WORD", help="Only claims with this word, or the one of this number.")
    ] = None,
    brief: Annotated[bool, typer.Option("--brief", help="One line per claim.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/claims.md.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """What two introductions claim, claim by claim: a verdict, the reason, its source, and the command that shows it.

    Figures are computed from the catalogue's architectures each time. Nothing is loaded or trained.
    """
    from manyhands.lab.claims import chosen, described, findings
    from manyhands.lab.claims_show import brief_lines, check_lines, lines, tally
    from manyhands.lab.claims_show import markdown as page

    if markdown:
        if check or document or only or brief or json_output:
            raise UserError("--markdown prints the whole page: leave the other options out")
        print(page(), end="")
        return
    if brief and (check or json_output):
        raise UserError("--brief is about the text: leave --check and --json out, or leave --brief out")
    groups = chosen(document, only)
    found = [(claim, finding) for _, claims in groups for claim in claims for finding in findings(claim)]
    off = [(claim, finding) for claim, finding in found if not finding.holds]
    if json_output:
        import json

        shown = [
            {"group": group.title} | described(claim, findings(claim)) for group, claims in groups for claim in claims
        ]
        print(json.dumps(shown, ensure_ascii=False))
    elif check:
        print(*check_lines(found), sep="\n")
        print(f"\n{tally(groups)}; {len(found)} figures, {len(found) - len(off)} as their claims need them")
    else:
        import shutil
        import sys

        width = max(40, min(shutil.get_terminal_size((80, 24)).columns, 110))
        told = (brief_lines if brief else lines)(groups, width, bold=styled(sys.stdout))
        print(*told, sep="\n")
    if check and off:
        claim, finding = off[0]
        raise CheckFailed(f"{len(off)} figures are off, the first: claim {claim.id}, {finding.figure.label}")
