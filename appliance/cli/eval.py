"""`appliance eval`: how well this box does on your own data."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import click

from appliance.cli.options import Context, verb_options
from appliance.cli.tables import print_table

if TYPE_CHECKING:
    from appliance.bench.judged import JudgedCollection
    from appliance.bench.retrieval import Evaluation


@click.group()
def command() -> None:
    """Measure how well your own documents are found."""


@command.command(
    epilog="Example: `appliance eval retrieval scifact`. FOLDER has corpus.jsonl, queries.jsonl and qrels/test.tsv, as "
    "the collections of BEIR do, or one JSON file of questions and paragraphs in SQuAD's form."
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--on-port",
    type=click.IntRange(1, 65535),
    metavar="PORT",
    help="Of a server that runs here already; else one is started.",
)
@click.option("--api-key", envvar="APPLIANCE_API_KEY", default="", help="Key for that server.")
@click.option("--queries", "most_queries", type=click.IntRange(min=1), help="Ask only the first so many.")
@verb_options
def retrieval(context: Context, *, folder: Path, on_port: int | None, api_key: str, most_queries: int | None) -> None:
    """Measure nDCG@10, recall, MRR and latency of searches, by words, by meaning and by both.

    The documents go into a vector store of their own over the HTTP API, with the settings as they are, and are erased
    afterwards.
    """
    from appliance.bench.judged import load

    result = asyncio.run(_evaluate(context, load(folder), on_port, api_key, most_queries))
    if context.json:
        context.print_json(result)
    else:
        _print(result)


async def _evaluate(
    context: Context, collection: JudgedCollection, port: int | None, api_key: str, most_queries: int | None
) -> Evaluation:
    from appliance.bench.retrieval import Server, evaluate
    from appliance.bench.server import running
    from appliance.bench.suite import ungrouped

    with ungrouped():
        if port is not None:
            return await evaluate(Server(port, api_key), collection, _say, most_queries=most_queries)
        _say("starting a server")
        async with running(context.settings, model="") as server:
            return await evaluate(Server(server.port), collection, _say, most_queries=most_queries)


def _say(progress: str) -> None:
    click.echo(f"{progress} ...", err=True)


def _print(result: Evaluation) -> None:
    click.echo(
        f"{result.documents:,} documents, taken in within {result.ingest_s:,.1f} s; {result.queries:,} queries.\n"
        "A document counts where its best passage stands. Times are of a whole request, the query's embedding included."
    )
    headings = ("Search", "nDCG@10", "Recall@10", "Recall@100", "MRR@10", "Empty", "p50 ms", "p95 ms")
    rows = [
        (
            each.mode,
            f"{each.ndcg_10:.3f}",
            f"{each.recall_10:.3f}",
            f"{each.recall_100:.3f}",
            f"{each.mrr_10:.3f}",
            f"{each.empty:,}",
            f"{each.p50_ms:.1f}",
            f"{each.p95_ms:.1f}",
        )
        for each in result.legs
    ]
    print_table(headings, rows)
