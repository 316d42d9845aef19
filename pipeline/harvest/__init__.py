"""Whatever yields rows, to activation stores."""
