"""`lora-adapters push`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .output import Output, output_options, print_table

if TYPE_CHECKING:
    from ..hub import UploadPlan


@click.command("push")
@click.argument("path", type=click.Path(file_okay=False))
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--dry-run", is_flag=True, help="List what would go up, and stop. Needs no token and no network.")
@click.option("--message", "-m", help="Commit message.")
@click.option("--revision", help="Branch to commit to; made if missing.")
@output_options
def command(
    path: str, repo: str, private: bool, dry_run: bool, message: str | None, revision: str | None, output: Output
) -> None:
    """Upload the adapter in PATH to the Hub repository REPO (name/repo), as one commit.

    PATH is an adapter's folder, or the folder of a run. Only what belongs to an adapter goes up: config, weights, card,
    licence and tokenizer. A damaged adapter is refused; the upload itself also reads every value first.
    """
    from ..hub import check_repo_id, plan_upload, upload

    check_repo_id(repo)
    plan = plan_upload(path)
    facts: dict[str, Any] = {
        "folder": str(plan.folder),
        "repo": repo,
        "revision": revision,
        "private": private,
        "dry_run": dry_run,
        "files": [{"name": name, "bytes": size} for name, size in plan.files],
        "left_out": [{"name": name, "reason": reason} for name, reason in plan.left_out],
        "warnings": list(plan.warnings),
        "commit": None,
    }
    for warning in plan.warnings:
        click.echo(f"Warning: {warning}", err=True)
    if not dry_run:
        output.say(f"checking the values and uploading {len(plan.files)} files to {repo}")
        _no_bars(output)
        facts["commit"] = upload(plan, repo, private=private or None, commit_message=message, revision=revision)
    output.show(facts, lambda: _print(plan, facts))


def _no_bars(output: Output) -> None:
    if output.quiet or output.as_json:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()


def _print(plan: UploadPlan, facts: dict[str, Any]) -> None:
    from ..budget import format_size

    print_table(
        [(name, format_size(size)) for name, size in plan.files], ("goes up" if facts["dry_run"] else "went up", "")
    )
    if plan.left_out:
        print_table(plan.left_out, ("stays here", "because it is"))
    click.echo(f"{facts['commit']}" if facts["commit"] else "Nothing was uploaded: a dry run.")
