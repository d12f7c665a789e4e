"""The room as a whole: the database, the indexes that are derived from it, the parser, and what works on them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from appliance.core.clock import Clock
from appliance.core.encoders import TextClassifiers
from appliance.core.errors import UnavailableError
from appliance.core.settings import Settings
from appliance.core.tensors import TensorModels
from appliance.core.types import EmbeddingModels
from appliance.retrieval.chunks import cut
from appliance.retrieval.documents import Documents
from appliance.retrieval.lexical import KeywordIndex
from appliance.retrieval.ownership import DocumentsElsewhere
from appliance.retrieval.parsing.parser import DocumentParser
from appliance.retrieval.parts import TokenCounter
from appliance.retrieval.passages import Passages
from appliance.retrieval.reading import ReadingParser
from appliance.retrieval.schema import open_retrieval
from appliance.retrieval.search import Reranking, Search
from appliance.retrieval.truth import StoredVectors
from appliance.retrieval.vectors import VectorIndexes
from appliance.store.ownership import ADVICE, own

LOGGER = logging.getLogger("appliance.retrieval")


@asynccontextmanager
async def open_documents(
    settings: Settings,
    clock: Clock,
    *,
    models: EmbeddingModels,
    counter: TokenCounter,
    rerankers: TextClassifiers,
    tensors: TensorModels,
) -> AsyncIterator[Documents | DocumentsElsewhere]:
    """Open what is stored, and close it on leaving, newest first; `Documents.run` does the work meanwhile.

    What another process owns is left to it, which is logged; every request for it is refused then.

    Args:
        settings: Folders, limits and models.
        clock: For ages and claims.
        models: Whatever embeds.
        counter: Counts in the embedder's tokens.
        rerankers: Whatever reads a hit with its query.
        tensors: Whatever runs the models that read pictures.

    Raises:
        StorageError: The database or an index cannot be opened.
    """
    async with contextlib.AsyncExitStack() as stack:
        documents: Documents | DocumentsElsewhere
        try:
            hold = await asyncio.to_thread(own, settings.retrieval_lock_path, _in_use)
            stack.enter_context(hold)
        except UnavailableError as error:
            LOGGER.warning("%s", error)
            documents = DocumentsElsewhere(error)
        else:
            documents = await _open(
                stack, settings, clock, models=models, counter=counter, rerankers=rerankers, tensors=tensors
            )
        yield documents


async def _open(
    stack: contextlib.AsyncExitStack,
    settings: Settings,
    clock: Clock,
    *,
    models: EmbeddingModels,
    counter: TokenCounter,
    rerankers: TextClassifiers,
    tensors: TensorModels,
) -> Documents:
    """Open what this process owns; the stack closes it."""
    database = await asyncio.to_thread(open_retrieval, settings.retrieval_path)
    stack.callback(database.close)
    keywords = await asyncio.to_thread(KeywordIndex, settings.keyword_index_dir)
    stack.push_async_callback(asyncio.to_thread, keywords.close)
    vectors = VectorIndexes(
        settings.vector_indexes_dir, StoredVectors(database), memory_bytes=settings.index_memory_bytes
    )
    stack.push_async_callback(asyncio.to_thread, vectors.close)
    parser = DocumentParser(settings)
    stack.push_async_callback(parser.close)
    search = Search(
        Passages(database),
        keywords=keywords,
        vectors=vectors,
        embedders=models,
        rerankers=rerankers,
        reranking=Reranking(model=settings.rerank_model),
    )
    return Documents(
        settings,
        database,
        clock,
        parser=ReadingParser(parser, tensors),
        cut=cut,
        counter=counter,
        models=models,
        keywords=keywords,
        vectors=vectors,
        searcher=search,
    )


def _in_use(owner: str) -> UnavailableError:
    return UnavailableError(
        f"The files and vector stores of this data folder are in use by {owner}.",
        advice=ADVICE,
        code="retrieval_in_use",
    )
