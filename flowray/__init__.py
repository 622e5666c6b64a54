"""Train text-to-image latent flow models, and draw with them: `flowray.load(RUN)`."""

from flowray.api import load as load
