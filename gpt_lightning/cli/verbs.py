"""What the program can do, in words; light enough to be read before the slow imports."""

VERBS = {
    "fit": "train a GPT (without options: the quickstart)",
    "validate": "loss and perplexity on the validation split",
    "test": "the same on the test files",
    "predict": "continue prompts with a trained model",
    "generate": "print text as it is written; interactive without a prompt",
    "prepare": "tokenize the texts into the cache, without training",
    "consolidate": "make one file of a sharded checkpoint",
    "import-hf": "make a checkpoint of a Hugging Face GPT-2, by folder or hub name",
    "export-hf": "make a Hugging Face folder of a checkpoint",
}
HELP = """usage: gpt-lightning VERB [--config FILE] [--option value ...]

Train a GPT from your own text, and sample from it.

{verbs}

  gpt-lightning fit
  gpt-lightning fit --config configs/shakespeare.yaml --data.train_files '["novels/*.txt"]'
  gpt-lightning predict --data.prompts '["Once upon a time"]'

The options of a verb: gpt-lightning VERB --help
"""
