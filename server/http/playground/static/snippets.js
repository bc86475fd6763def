// Code that sends the same request as the page.

/**
 * Return the request as commands and as a program.
 *
 * @param {string} url address of the server, without a slash at its end
 * @param {Object<string, string|number>} query options of the request
 * @param {boolean} needsKey the server requires an API key, which the code reads from the environment
 */
export function snippets(url, query, needsKey) {
    return { curl: curl(url, query, needsKey), python: python(url, query, needsKey) };
}

/** Return the name of the file for an image of a format. */
export function imageName(format) {
    return `image.${format === "jpeg" ? "jpg" : format}`;
}

function curl(url, query, needsKey) {
    const lines = [
        `curl --fail-with-body '${url}/decode?${new URLSearchParams(query)}'`,
        ...(needsKey ? ['-H "Authorization: Bearer $PID_API_KEY"'] : []),
        "-H 'Content-Type: application/x-npy' --data-binary @latent.npy",
        `--output ${imageName(query.format)}`,
    ];
    return lines.join(" \\\n    ");
}

function python(url, query, needsKey) {
    const options = Object.entries(query).map(([name, value]) => `${name}=${JSON.stringify(value)}`);
    const key = needsKey ? ', api_key=os.environ["PID_API_KEY"]' : "";
    return [
        ...(needsKey ? ["import os", ""] : []),
        "import numpy",
        "from pid_client import PidClient",
        "",
        'latent = numpy.load("latent.npy")',
        `with PidClient("${url}"${key}) as client:`,
        `    image = client.decode(latent, ${options.join(", ")})`,
        `image.save("${imageName(query.format)}")`,
    ].join("\n");
}
