"""Model specs to `nn.Module`s, our own VGG and ResNet, and checkpoints in and out of them."""
