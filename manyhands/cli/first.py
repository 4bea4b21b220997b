"""What `manyhands` says alone: the five things that one does first."""

FIRST = """\
manyhands: the toolkit for mixture-of-experts language models

  manyhands train --preset quickstart                    train a small one here
  manyhands generate runs/quickstart --prompt "def "     let it continue a text
  manyhands inspect runs/quickstart                      see what its experts do
  manyhands serve runs/quickstart                        OpenAI's API, and a page
  manyhands plan mixtral-8x7b --machine here             what would a large one cost

Every verb: manyhands --help. One of them: manyhands train --help.
"""
