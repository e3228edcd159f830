"""gconv in other people's networks: swap their convolutions, fold their batch norms, fuse around them."""
