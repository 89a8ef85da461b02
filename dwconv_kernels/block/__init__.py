"""The ConvNeXt block as one operator."""
