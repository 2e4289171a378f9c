"""Rows → tokens → plan → batches: what happens to a dataset before the model sees it."""

from ibft.data.encode import encode
from ibft.data.encoded import Document, EncodedDataset, EncodeReport
from ibft.data.loader import load_batches
from ibft.data.mixture import load_data
from ibft.data.packing import BatchPlan, Lengths, collate, document_lengths
from ibft.data.sources import load_rows

__all__ = [
    "BatchPlan",
    "Document",
    "EncodeReport",
    "EncodedDataset",
    "Lengths",
    "collate",
    "document_lengths",
    "encode",
    "load_batches",
    "load_data",
    "load_rows",
]
