"""Datasets over the tokenizer of bytes."""

from dataset.tokens.examples import PretrainDataset, SFTDataset
from tests.helpers.tokenizers import ByteTokenizer


def pretrain(paths, tokenizer=None, **options):
    return PretrainDataset(paths, tokenizer or ByteTokenizer(), **dict(max_seq_len=4) | options)


def sft(paths, tokenizer=None, **options):
    return SFTDataset(paths, tokenizer or ByteTokenizer(), **dict(max_seq_len=100) | options)
