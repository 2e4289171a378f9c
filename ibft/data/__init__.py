"""Rows → tokens → plan → batches: what happens to a dataset before the model sees it."""

from ibft.data.encode import Document, EncodedDataset, EncodeReport, encode
from ibft.data.packing import BatchPlan, collate
from ibft.data.sources import load_rows

__all__ = ["BatchPlan", "Document", "EncodeReport", "EncodedDataset", "collate", "encode", "load_rows"]
