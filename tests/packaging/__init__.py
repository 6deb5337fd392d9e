"""What operators get beside the package: manual pages, completion, units, container, Debian package."""
