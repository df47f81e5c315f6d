"""The export stage: graphs with the weights of a checkpoint behind them."""
