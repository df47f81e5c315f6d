"""Tokenizer, chat template and image processor of a bundle, without transformers and torch.

An export writes down what transformers made of the checkpoint's files, with every setting resolved. What is here only
applies that: it knows no file of a checkpoint, and gives the same tokens and pixels to the last bit.
"""
