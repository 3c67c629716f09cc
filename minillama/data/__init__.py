"""Text to batches, in reading order.

tales writes the toy world's stories, raw_web its dirty web; corpora and documents read texts.
curation cleans a source with LLaMA's rules: language, ngram, reference, heuristics, duplicates for
web pages, github, wikipedia, latex and stackexchange for what their names say; cluster does it with
many workers. packing makes rows of token ids and batches of rows, mixture draws from many sources.
"""
