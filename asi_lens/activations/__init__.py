"""One pass of the model, and the results kept from it: moments, spectra, stores."""
